"""One stage from its flags to its output folder: load, train, fit the router, save."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, set_seed

from llava.data.dataset import SFTCollator, SFTDataset
from llava.model.builder import Checkpoint
from llava.model.families import count_image_tokens, get_image_token_id
from llava.train import checkpointing
from llava.train.arguments import FULL_BITS, Arguments, learning_rates, stage_of
from llava.train.callbacks import Console, HangDetection, LossGuard, MetricsFile, RoutingMeter, Throughput
from llava.train.load_model import load_model
from llava.train.objectives import make_objective
from llava.train.parameters import TrainableCheck, add_lora, freeze_all_but, prepare_quantized, quantization_options
from llava.train.router_fitting import attach_new_router, fit_router
from llava.train.routing_policies import make_policy
from llava.train.stages import Stage
from llava.train.trainer import LlavaTrainer
from llava.train.zero3 import ZeroMissingGradients, describe_engine, init_communication, prepare_model


def run_stage(arguments: Arguments) -> dict[str, Any]:
    """Run one stage and write its output folder.

    The folder is written beside its final place and renamed once complete, so ``output_dir`` either holds a whole
    checkpoint or what it held before.

    Returns:
        The stage's summary, as in ``stage.json``.
    """
    started, cpu_started = time.time(), time.process_time()
    _, _, stage_args, training_args = arguments
    stage, output = stage_of(arguments), Path(str(training_args.output_dir))
    partial, is_main = checkpointing.partial_folder(output), training_args.process_index == 0
    if training_args.deepspeed:
        init_communication()
    run = checkpointing.describe_run(arguments)
    # one answer for all ranks: a shared disk may show them different folders for a moment
    resumed = from_rank_0(
        lambda: checkpointing.begin_folder(partial, training_args.resume_from_checkpoint, run), is_main
    )
    if is_main:
        (partial / "run_hash").write_text(training_args.run_hash + "\n")
        if resumed is not None:
            say(f"going on from step {checkpointing.step_of(resumed)}, saved in {resumed}")
    checkpoint = prepare_checkpoint(stage, arguments)
    # before the engine exists: it takes over the parameters that require a gradient, and no others
    trained = freeze_all_but(checkpoint.model, stage)
    facts = checkpointing.read_manifest(resumed)["facts"] if resumed else {}
    check = TrainableCheck(checkpoint.model, stage, facts.get("moved"))
    limit = training_args.save_total_limit
    steps = checkpointing.StepCheckpoints(partial, run, limit, lambda: {"moved": check.moved})
    trainer = build_trainer(stage, checkpoint, arguments, [steps, check])
    summary: dict[str, Any] = {"stage": stage.name, "purpose": stage.purpose, "samples": len(trainer.train_dataset)}
    if stage.trains:
        if is_main:
            (partial / "trainable_params.json").write_text(json.dumps(trained, indent=2) + "\n")
        # a run should fail before its first step and not at its last
        checkpointing.dry_run_save(trainer, checkpoint, partial)
        result = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        summary |= {
            "steps": result.global_step,
            "resumed_at": checkpointing.step_of(resumed) if resumed else None,
            "global_batch": trainer.get_total_train_batch_size(trainer.args),
            "training_loss": result.training_loss,
            "training_seconds": time.time() - started,
            "training_cpu_seconds": time.process_time() - cpu_started,
            "moved": check.moved,
        }
    if stage.calibrates:
        progress = say if is_main else lambda line: None
        summary["calibration"] = fit_router(trainer, stage_args, checkpoint, progress)
    summary |= describe_engine(trainer)
    summary["seconds"] = time.time() - started
    checkpointing.save_stage(trainer, checkpoint, stage, output, summary)
    if is_main:
        say(f"{stage.name}: {summary['engine']}, ZeRO {summary['zero_stage']}, world size {summary['world_size']}")
        say(f"{stage.name}: {summary['seconds']:.0f} s in all, written to {output}")
    return summary


def prepare_checkpoint(stage: Stage, arguments: Arguments) -> Checkpoint:
    """Load what a stage starts from and add what it trains: a router with adapters, LoRA; call on all ranks."""
    model_args, _, stage_args, training_args = arguments
    dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    checkpoint = load_model(model_args, dtype, training_args.seed, **quantization_options(training_args, dtype))
    set_seed(training_args.seed)  # loading draws random numbers, under ZeRO-3 others than in one process
    if stage.routing != "off" and checkpoint.routing is None:
        attach_new_router(checkpoint.model, stage_args)
    if training_args.bits != FULL_BITS:
        prepare_quantized(checkpoint.model)
    if "lora" in stage.trains:
        add_lora(checkpoint.model, training_args.lora_r, training_args.lora_alpha, training_args.lora_dropout)
    prepare_model(checkpoint.model, getattr(stage_args, "train_hard_skip", False), bool(training_args.deepspeed))
    return checkpoint


def build_trainer(
    stage: Stage, checkpoint: Checkpoint, arguments: Arguments, callbacks: Sequence[TrainerCallback] = ()
) -> LlavaTrainer:
    """Build the trainer of a stage, complete.

    Args:
        stage: What trains and how layers are routed.
        checkpoint: What ``prepare_checkpoint`` gave, frozen as the stage wants it.
        arguments: The flags, which stay as they are.
        callbacks: Called before the trainer's own.
    """
    model_args, data_args, stage_args, training_args = arguments
    model, config = checkpoint.model, checkpoint.model.config
    config.image_aspect_ratio = data_args.image_aspect_ratio  # saved, so that evaluation prepares images alike
    config.conv_template = model_args.version  # saved, so that a chat goes on as training began
    dataset = SFTDataset(
        data_args.data_path,
        data_args.image_folder,
        checkpoint.tokenizer,
        checkpoint.image_processor,
        model_args.version,
        count_image_tokens(config),
        get_image_token_id(config),
        training_args.model_max_length,
        data_args.image_aspect_ratio,
    )
    # a copy: the flags are described in manifests and checked again, so they stay what the user gave
    args = copy.copy(training_args)
    args.output_dir = str(checkpointing.partial_folder(Path(str(training_args.output_dir))))
    args.save_total_limit = None  # StepCheckpoints removes the oldest, once the newest is whole

    def source_of(index: int) -> str:
        return dataset.records[index].source

    def name_of(index: int) -> str:  # the place in the file, with the file's own identifier
        return f"{index} (id {dataset.records[index].id!r})"

    observers: list[TrainerCallback] = [LossGuard(name_of), Throughput()]
    if stage.routing != "off":
        observers.append(RoutingMeter(source_of, getattr(model.get_decoder().router, "rules", None)))
    if training_args.watchdog_seconds > 0:
        observers.append(HangDetection(model, training_args.watchdog_seconds, name_of, training_args.process_index))
    if getattr(stage_args, "train_hard_skip", False) and not training_args.deepspeed:
        observers.append(ZeroMissingGradients())
    return LlavaTrainer(
        learning_rates=learning_rates(stage_args, training_args),
        routing_policy=make_policy(stage, model, stage_args, source_of),
        objective=make_objective(stage_args.objective or stage.objective, stage_args),
        write_model=lambda folder: checkpointing.write_model(checkpoint, stage, folder, folder, args.should_save),
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=SFTCollator(checkpoint.tokenizer.pad_token_id),
        callbacks=[*callbacks, MetricsFile(Path(args.output_dir) / "metrics.jsonl"), Console(), *observers],
    )


def from_rank_0(function: Any, is_main: bool) -> Any:
    """Call a function on rank 0 and give all ranks its result; call on all of them."""
    return broadcast_object_list([function() if is_main else None])[0]


def say(line: str) -> None:
    """Print one line of progress; this is a command-line program."""
    print(line, flush=True)
