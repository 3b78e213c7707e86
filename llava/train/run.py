"""What happens in one stage, in order."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import PrinterCallback, ProgressCallback, set_seed

from fuzzyroe.attach import find_decoder
from fuzzyroe.routers import LinearRouter
from fuzzyroe.routers.roe.compat import PRESETS
from llava.data.dataset import SFTCollator, SFTDataset
from llava.image_tokens import count_image_tokens
from llava.model.builder import Checkpoint
from llava.model.routing import attach_routing
from llava.model.zero3_text_batches import make_text_batches_safe
from llava.train.arguments import (
    DEFAULT_ADAPTER_WIDTH,
    DEFAULT_COMPAT,
    DEFAULT_SUMMARY,
    FULL_BITS,
    DataArguments,
    LlavaTrainingArguments,
    ModelArguments,
    PlanArguments,
    RoEArguments,
    RoutedArguments,
    StageArguments,
    learning_rates,
    parse_source_ratios,
    stage_of,
)
from llava.train.batch_routing import AnnealedRouting, BudgetedRouting, RandomRouting
from llava.train.callbacks import Console, MetricsFile
from llava.train.checkpoint import save_stage, write_json, write_model
from llava.train.engine import describe_engine, init_engine_communication
from llava.train.forecast import Forecast
from llava.train.hard_skip import ZeroMissingGradients, prepare_hard_skip
from llava.train.load_model import load_model
from llava.train.lora import add_lora
from llava.train.loss_guard import LossGuard
from llava.train.movement import MovementCheck
from llava.train.observers import Observers, name_of, source_of
from llava.train.param_groups import freeze_all_but
from llava.train.per_source_budgets import SourceTargets
from llava.train.quantized import loading_options, prepare_quantized
from llava.train.refit import make_plan_router, refit
from llava.train.rehearsal import rehearse_save
from llava.train.roe_routing import RelaxedRouting, RoEObjective
from llava.train.routing_metrics import RoutingMeter, Throughput
from llava.train.stages import Stage
from llava.train.step_checkpoint import StepSaving, describe_run, find_resume, partial_folder, read_facts, step_of
from llava.train.trainer import LlavaTrainer
from llava.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def run_stage(
    model_args: ModelArguments,
    data_args: DataArguments,
    routing_args: StageArguments,
    training_args: LlavaTrainingArguments,
) -> dict[str, Any]:
    """Run one stage and write its output folder.

    The folder is written beside its final place and renamed once complete, so ``output_dir`` either holds a whole
    checkpoint or what it held before.

    Returns:
        The stage's summary, as in ``stage.json``.
    """
    started, cpu_started = time.time(), time.process_time()
    stage = stage_of(model_args, routing_args, training_args)
    output = Path(training_args.output_dir)
    partial = partial_folder(output)
    training_args.output_dir = str(partial)
    if training_args.deepspeed:
        init_engine_communication()
    described = describe_run(model_args, data_args, routing_args, training_args)
    resumed = _begin_folder(partial, described, training_args)
    dtype = torch_dtype(training_args)
    checkpoint = load_model(model_args, dtype, training_args.seed, **loading_options(training_args, dtype))
    set_seed(training_args.seed)  # loading draws random numbers, under ZeRO-3 others than in one process
    if isinstance(routing_args, RoutedArguments) and checkpoint.routing is None:
        _attach_new_router(checkpoint, routing_args)
    if training_args.bits != FULL_BITS:
        prepare_quantized(checkpoint.model)
    if "lora" in stage.trains:
        rank, alpha, dropout = training_args.lora_r, training_args.lora_alpha, training_args.lora_dropout
        add_lora(checkpoint.model, rank, alpha, dropout)
    make_text_batches_safe(checkpoint.model)
    if isinstance(routing_args, PlanArguments) and routing_args.train_hard_skip:
        prepare_hard_skip(checkpoint.model, training_args)
    trained = freeze_all_but(checkpoint.model, stage)
    movement = MovementCheck(checkpoint.model, stage, read_facts(resumed)["moved"] if resumed else None)
    trainer = _build_trainer(stage, checkpoint, model_args, data_args, routing_args, training_args)
    trainer.step_saving = StepSaving(
        described,
        lambda trainer, folder: write_model(trainer, checkpoint, stage, folder, partial / folder.name),
        lambda: {"moved": movement.moved},
    )
    summary: dict[str, Any] = {"stage": stage.name, "purpose": stage.purpose, "samples": len(trainer.train_dataset)}
    if stage.trains:
        if training_args.process_index == 0:
            write_json(partial / "trainable_params.json", trained)
        rehearse_save(trainer, checkpoint, partial)
        trainer.add_callback(movement)
        result = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        summary |= {
            "steps": result.global_step,
            "resumed_at": step_of(resumed) if resumed else None,
            "global_batch": trainer.get_total_train_batch_size(training_args),
            "training_loss": result.training_loss,
            "training_seconds": time.time() - started,
            "training_cpu_seconds": time.process_time() - cpu_started,
            "moved": movement.moved,
        }
    if stage.calibrates:
        progress = say if training_args.process_index == 0 else lambda line: None
        summary["calibration"] = refit(trainer, routing_args, checkpoint, progress)
    summary |= describe_engine(trainer)
    summary["seconds"] = time.time() - started
    save_stage(trainer, checkpoint, stage, output, summary)
    if training_args.process_index == 0:
        say(f"{stage.name}: {summary['engine']}, ZeRO {summary['zero_stage']}, world size {summary['world_size']}")
        say(f"{stage.name}: {summary['seconds']:.0f} s in all, written to {output}")
    return summary


def _begin_folder(partial: Path, described: dict[str, Any], training_args: LlavaTrainingArguments) -> Path | None:
    """Find what to resume and remove what an earlier run left if that is nothing; the same answer on all ranks."""
    found: list[Any] = [None]
    if training_args.process_index == 0:
        found = [find_resume(training_args.resume_from_checkpoint, partial, described)]
        if found[0] is None:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "fingerprint").write_text(training_args.fingerprint + "\n")
    if distributed.is_initialized():
        distributed.broadcast_object_list(found)
    if found[0] is not None and training_args.process_index == 0:
        say(f"going on from step {step_of(found[0])}, saved in {found[0]}")
    return found[0]


def torch_dtype(training_args: LlavaTrainingArguments) -> torch.dtype:
    """Data type weights are loaded in: bfloat16 or float16 where the flags say so, float32 otherwise."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


def say(line: str) -> None:
    """Print one line of progress; this is a command-line program."""
    print(line, flush=True)


def _attach_new_router(checkpoint: Checkpoint, routing_args: RoutedArguments) -> None:
    text_config, width = checkpoint.model.config.text_config, routing_args.adapter_hidden_dim or DEFAULT_ADAPTER_WIDTH
    if isinstance(routing_args, RoEArguments):
        router = LinearRouter(
            text_config.num_hidden_layers,
            text_config.hidden_size,
            routing_args.routing_summary or DEFAULT_SUMMARY,
            PRESETS[routing_args.roe_compat or DEFAULT_COMPAT],
        )
        attach_routing(checkpoint.model, router, width, "zero" if routing_args.freeze_adapters else "xavier")
        return
    attach_routing(checkpoint.model, make_plan_router(routing_args, text_config.num_hidden_layers), width)


def _build_trainer(
    stage: Stage,
    checkpoint: Checkpoint,
    model_args: ModelArguments,
    data_args: DataArguments,
    routing_args: StageArguments,
    training_args: LlavaTrainingArguments,
) -> LlavaTrainer:
    config = checkpoint.model.config
    config.image_aspect_ratio = data_args.image_aspect_ratio  # saved, so that evaluation prepares images alike
    config.conv_template = model_args.version  # saved, so that a chat goes on as training began
    dataset = SFTDataset(
        data_args.data_path,
        data_args.image_folder,
        checkpoint.tokenizer,
        checkpoint.image_processor,
        model_args.version,
        count_image_tokens(config),
        config.image_token_id,
        training_args.model_max_length,
        data_args.image_aspect_ratio,
    )
    rates = learning_rates(routing_args, training_args)
    routing, forecast, mode = None, None, "soft"
    if isinstance(routing_args, PlanArguments):
        mode = "hard" if routing_args.train_hard_skip else "soft"
        forecast = Forecast(checkpoint.model) if routing_args.adapter_objective == "forecast" else None
    if isinstance(routing_args, PlanArguments) and routing_args.skip_pattern == "random":
        num_layers = config.text_config.num_hidden_layers
        routing = RandomRouting(config.image_token_id, num_layers, routing_args.max_skip_ratio, mode)
    elif isinstance(routing_args, PlanArguments) and routing_args.adapter_objective == "answers":
        budgets = (config.image_token_id, routing_args.max_skip_ratio, routing_args.dense_ratio)
        targets = _source_targets(dataset, routing_args)
        if routing_args.anneal_softness > 0:
            routing = AnnealedRouting(*budgets, routing_args.anneal_softness, targets)
        else:
            routing = BudgetedRouting(*budgets, mode, targets)
    callbacks, objective = [MetricsFile(Path(training_args.output_dir) / "metrics.jsonl"), Console()], None
    if isinstance(routing, AnnealedRouting):
        callbacks.append(routing)
    if mode == "hard" and not training_args.deepspeed:
        callbacks.append(ZeroMissingGradients(checkpoint.model))
    if isinstance(routing_args, RoEArguments):
        compat, skip_ratio = find_decoder(checkpoint.model).router.compat, routing_args.target_skip_ratio
        num_layers = config.text_config.num_hidden_layers
        routing = RelaxedRouting(config.image_token_id, num_layers, stage.span, skip_ratio, compat)
        objective = RoEObjective(skip_ratio, compat.damping, routing_args.skip_loss_weight)
        callbacks.append(routing)
    observers = _build_observers(checkpoint, dataset, stage, training_args)
    trainer = LlavaTrainer(
        stage=stage,
        learning_rates=rates,
        batch_routing=routing,
        objective=objective,
        forecast=forecast,
        observers=observers,
        model=checkpoint.model,
        args=training_args,
        train_dataset=dataset,
        data_collator=SFTCollator(checkpoint.tokenizer.pad_token_id),
        callbacks=[*callbacks, *observers.callbacks()],
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def _source_targets(dataset: SFTDataset, routing_args: PlanArguments) -> SourceTargets | None:
    if routing_args.source_skip_ratios is None:
        return None
    targets = parse_source_ratios(routing_args.source_skip_ratios, routing_args.max_skip_ratio)
    return SourceTargets(targets, routing_args.max_skip_ratio, functools.partial(source_of, dataset))


def _build_observers(
    checkpoint: Checkpoint, dataset: SFTDataset, stage: Stage, training_args: LlavaTrainingArguments
) -> Observers:
    name = functools.partial(name_of, dataset)
    meter = watchdog = None
    if stage.routing != "off":
        rules = getattr(find_decoder(checkpoint.model).router, "rules", None)
        meter = RoutingMeter(functools.partial(source_of, dataset), rules)
    if training_args.watchdog_seconds > 0:
        watchdog = Watchdog(checkpoint.model, training_args.watchdog_seconds, name, training_args.process_index)
    return Observers(LossGuard(name), Throughput(), meter, watchdog)
