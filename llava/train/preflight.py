"""Refusal of bad input before a model is loaded."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from fuzzyroe.features import FEATURES
from fuzzyroe.rules import load_rule_base
from llava.conversation import get_template
from llava.data.check import check_data
from llava.data.lengths import LengthMeter
from llava.data.records import RecordFile
from llava.image_tokens import count_image_tokens
from llava.model.checkpoints.layout import LANGUAGE_MODELS, is_language_model, read_config_dict
from llava.model.checkpoints.projector import PROJECTOR_NAMES, read_projector
from llava.model.checkpoints.reading import read_config_and_tokenizer
from llava.train.arguments import (
    DEFAULT_PLAN_ROUTER,
    DEFAULT_RULE_BASE,
    DataArguments,
    LlavaTrainingArguments,
    ModelArguments,
    RoutingArguments,
    stage_of,
)
from llava.train.hard_skip import check_hard_skip
from llava.train.load_model import check_agreement, vision_settings
from llava.train.lora import import_peft
from llava.train.quantized import check_quantized
from llava.train.roe_preflight import check_roe
from llava.train.stages import Stage, StageInputError
from llava.train.step_checkpoint import describe_run, find_resume, partial_folder
from llava.train.task_targets import check_task_targets, parse_task_targets
from llava.train.unused_flags import check_unused

logger = logging.getLogger(__name__)

LLAVA_TYPES = ("llava", "llava_llama")
"""Model types of LLaVA checkpoints; the second is LLaVA's own since its version 1.6."""

DEFAULT_EVAL_BATCH = 8
"""transformers' default of a flag that has nothing to act on here."""

MIN_FREE_BYTES = 64 * 2**20

MIN_CALIBRATION_SAMPLES = 8
"""One for each bin of scores that ``fuzzyroe.calibrate.calibrate_router`` makes."""


def check_inputs(
    model_args: ModelArguments,
    data_args: DataArguments,
    routing_args: RoutingArguments,
    training_args: LlavaTrainingArguments,
) -> None:
    """Check everything that can be checked without a model.

    Raises:
        ValueError: With what was found, what is allowed, what to do.
        KeyError: If the stage or the conversation template is unknown.
        OSError: If a model or file is not there.
        ImportError: If a package is missing that a flag needs.
    """
    stage = stage_of(model_args, routing_args, training_args)
    get_template(model_args.version)
    config, sources = _check_model(model_args, stage)
    _check_extras(training_args, stage)
    check_unused(stage, routing_args, training_args)
    _check_routing(config.get("fuzzyroe"), stage, model_args.model_name_or_path, routing_args)
    output = Path(training_args.output_dir)
    _check_output(output, sources)
    _check_deepspeed(training_args, stage)
    if routing_args.adapter_objective == "forecast":
        _check_forecast(stage, routing_args)
    if routing_args.anneal_softness > 0:
        _check_annealing(stage, routing_args)
    if routing_args.train_hard_skip:
        check_hard_skip(stage, training_args)
    checkpointing = training_args.gradient_checkpointing_kwargs or {}
    if training_args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise StageInputError(
            "use_reentrant=True cuts the gradient of routing silently; remove it (non-reentrant is the default)."
        )
    if not training_args.skip_data_check:
        _check_records(model_args, data_args, training_args)
    if routing_args.task_skip_ratios is not None:
        targets = parse_task_targets(routing_args.task_skip_ratios, routing_args.max_skip_ratio)
        pattern, objective = routing_args.skip_pattern, routing_args.adapter_objective
        check_task_targets(stage, targets, data_args.data_path, pattern, objective)
    _check_number(len(RecordFile(data_args.data_path)), stage, routing_args, training_args.world_size)
    run = describe_run(model_args, data_args, routing_args, training_args)
    find_resume(training_args.resume_from_checkpoint, partial_folder(output), run)


def _check_routing(block: dict | None, stage: Stage, model_path: str, routing_args: RoutingArguments) -> None:
    """A stage that trains along the router's plans needs a calibrated router, a dense one none at all."""
    check_roe(block, stage, model_path, routing_args)
    if stage.routing == "plan" and not block:
        _check_rule_base(routing_args.rule_base or DEFAULT_RULE_BASE)
    for name in ("rule_base", "router"):
        if block and getattr(routing_args, name) is not None:
            raise StageInputError(
                f"--{name} {getattr(routing_args, name)} was given, but {model_path} has a router already; leave it "
                "out, or start from a dense checkpoint."
            )
    router = (block or {}).get("router") or routing_args.router or DEFAULT_PLAN_ROUTER
    has_score = router in ("fuzzy", "fuzzy_per_layer", "linear_score")
    for name in ("rule_base", "per_layer_tables", "anneal_softness"):
        if stage.routing == "plan" and not has_score and getattr(routing_args, name):
            raise StageInputError(
                f"--{name} {getattr(routing_args, name)} was given, but a {router} router has no score; leave it out, "
                "or use --router fuzzy."
            )
    if block and routing_args.adapter_hidden_dim not in (None, block.get("adapter_width")):
        raise StageInputError(
            f"--adapter_hidden_dim {routing_args.adapter_hidden_dim} was given, but the adapters of {model_path} are "
            f"{block.get('adapter_width')} wide; leave it out, or start from a dense checkpoint."
        )
    if stage.routing == "off" and block:
        raise StageInputError(
            f"{model_path} is routed, stage {stage.name} trains dense models; name its base model, or another --stage."
        )
    needs_plans = routing_args.skip_pattern == "plan" and routing_args.adapter_objective == "answers"
    if stage.trains and stage.routing == "plan" and not block and needs_plans:
        raise StageInputError(
            f"Stage {stage.name} follows the plans of a calibrated router, but {model_path} has none; run the router "
            "stage first, or start with --skip_pattern random."
        )


def _check_forecast(stage: Stage, routing_args: RoutingArguments) -> None:
    """Forecasts train adapters alone, on the states of the dense model."""
    if stage.name != "adapter":
        raise StageInputError(
            f"--adapter_objective forecast was given, but it trains adapters alone, not stage {stage.name}; leave it "
            "out, or use the stage adapter."
        )
    if routing_args.train_hard_skip or routing_args.skip_pattern != "plan":
        raise StageInputError(
            "--adapter_objective forecast skips nothing while it trains; leave out --train_hard_skip and "
            "--skip_pattern."
        )


def _check_annealing(stage: Stage, routing_args: RoutingArguments) -> None:
    """Only soft plans of a fuzzy router harden."""
    is_planned = stage.trains and stage.routing == "plan" and routing_args.skip_pattern == "plan"
    if not is_planned or routing_args.train_hard_skip or routing_args.adapter_objective != "answers":
        raise StageInputError(
            f"--anneal_softness {routing_args.anneal_softness} was given, but only plans of the router in the stages "
            "adapter and finetune can be soft; leave it out, or leave out --train_hard_skip, --skip_pattern and "
            "--adapter_objective."
        )


def _check_rule_base(name: str) -> None:
    """The rule base must load, and its antecedents must be features."""
    unknown = [v.name for v in load_rule_base(name).antecedents if v.name not in FEATURES]
    if unknown:
        raise StageInputError(f"Rule base {name} has antecedents {unknown}, no features; use {', '.join(FEATURES)}.")


def _check_model(model_args: ModelArguments, stage: Stage) -> tuple[dict, list[Path]]:
    """Read the configuration, with the folders that the model's files lie in, none if it comes from the hub."""
    path = model_args.model_name_or_path
    config, folder = read_config_dict(path), Path(path)
    if is_language_model(config):
        if stage.routing != "off":
            raise StageInputError(
                f"{path} is a language model, stage {stage.name} routes a LLaVA checkpoint; run the stages pretrain "
                "and dense first, or name a LLaVA checkpoint."
            )
        text_side = read_config_and_tokenizer(path, vision_settings(model_args))[0]
    elif config.get("model_type") in LLAVA_TYPES:
        check_agreement(config, model_args)
        text_side = read_config_and_tokenizer(path)[0]
    else:
        raise StageInputError(
            f"{path} is a model of type {config.get('model_type')}; {', '.join((*LLAVA_TYPES, *LANGUAGE_MODELS))} can "
            "be trained. Name another."
        )
    if model_args.pretrain_mm_mlp_adapter is not None:
        _check_projector(model_args.pretrain_mm_mlp_adapter, text_side)
    if not folder.exists():
        return config, []
    if (folder / "adapter_config.json").exists():
        raise StageInputError(
            f"{path} holds low-rank updates of another model; a whole checkpoint is needed. Merge them first: "
            f"fuzzyroe convert {path} OUTPUT."
        )
    base = (config.get("fuzzyroe") or {}).get("base_model")
    if base is None or not (base.startswith((".", "/")) or (folder / base).exists()):
        return config, [folder]
    if not (folder / base / "config.json").is_file():
        raise StageInputError(
            f"{path} holds no backbone weights and its base model is not at {folder / base}; put it there, or "
            "correct fuzzyroe.base_model in its config.json."
        )
    return config, [folder, folder / base]


def _check_projector(file: str, config: Any) -> None:
    """The projector's file must hold one, of the size of the model's."""
    found = tuple(read_projector(file)[PROJECTOR_NAMES[0]].shape)
    wanted = (config.text_config.hidden_size, config.vision_config.hidden_size)
    if found != wanted:
        raise StageInputError(
            f"--pretrain_mm_mlp_adapter {file} maps {found[1]} features to {found[0]}, the model needs {wanted[1]} to "
            f"{wanted[0]}; name the one that was trained for these two models."
        )


def _check_extras(training_args: LlavaTrainingArguments, stage: Stage) -> None:
    """Refuse flags that nothing would act on, and what needs a package that is missing."""
    if "lora" in stage.trains:
        import_peft()
    check_quantized(stage, training_args)
    for name in training_args.report_to:
        if name in ("wandb", "tensorboard") and importlib.util.find_spec(name) is None:
            raise StageInputError(
                f"--report_to {name} was given, but {name} is not installed; pip install {name}, or --report_to none "
                "(every value is in OUTPUT/metrics.jsonl as well)."
            )
    if training_args.eval_strategy.value != "no" or training_args.per_device_eval_batch_size != DEFAULT_EVAL_BATCH:
        raise StageInputError(
            "--eval_strategy or --per_device_eval_batch_size was given, but nothing is evaluated while training; leave "
            "them out and run scripts/v1_5/eval.sh afterwards."
        )


def _check_output(output: Path, sources: list[Path]) -> None:
    """The output must be writable and must not replace what it is made from."""
    for source in sources:
        if output.resolve() == source.resolve():
            raise StageInputError(
                f"--output_dir {output} is the folder that the model is read from; choose another, so that it stays."
            )
    parent = output.absolute()
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise StageInputError(f"{parent} is a file, --output_dir {output} needs a folder there; choose another.")
    if not os.access(parent, os.W_OK):
        raise StageInputError(f"{parent} cannot be written; choose another --output_dir.")
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE_BYTES:
        raise StageInputError(
            f"{parent} has {free / 2**20:.0f} MiB free, at least {MIN_FREE_BYTES // 2**20} MiB are needed; make room."
        )


def _check_deepspeed(training_args: LlavaTrainingArguments, stage: Stage) -> None:
    """A DeepSpeed JSON must leave the optimizer to the trainer, be able to save, and to run without an optimizer."""
    if not training_args.deepspeed or isinstance(training_args.deepspeed, dict):
        return
    config = json.loads(Path(training_args.deepspeed).read_text())
    if "optimizer" in config:
        raise StageInputError(
            f"{training_args.deepspeed} has an 'optimizer' entry, which would silently drop the learning rates by part;"
            " remove it."
        )
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise StageInputError(
            f"{training_args.deepspeed} cannot save under ZeRO-3; set "
            "zero_optimization.stage3_gather_16bit_weights_on_model_save to true."
        )
    if not stage.trains and zero.get("stage") != 3:
        raise StageInputError(
            f"{training_args.deepspeed} has ZeRO stage {zero.get('stage', 0)}; stage {stage.name} only runs forward "
            "passes, which DeepSpeed does with ZeRO stage 3 alone. Use scripts/zero3.json, or leave --deepspeed out."
        )


def _check_number(found: int, stage: Stage, routing_args: RoutingArguments, world_size: int) -> None:
    """Calibration needs samples in every bin of scores and, for each of its passes, on every process."""
    if not stage.calibrates:
        return
    is_planned = stage.routing == "plan"
    names = ("calibration_samples", "order_samples", "score_samples") if is_planned else ("budget_samples",)
    asked = {name: getattr(routing_args, name) for name in names}
    for name, number in asked.items():
        usable = min(found, number) // world_size * world_size
        needed = MIN_CALIBRATION_SAMPLES if name == "calibration_samples" else world_size
        if usable < needed:
            raise StageInputError(
                f"Stage {stage.name} would calibrate on {usable} samples ({found} records, --{name} {number}, "
                f"{world_size} processes); at least {needed} are needed. Give more."
            )


def _check_records(model_args: ModelArguments, data_args: DataArguments, training_args: LlavaTrainingArguments) -> None:
    """Look at every record, every image and the lengths, as ``fuzzyroe check-data`` does."""
    is_composed = is_language_model(read_config_dict(model_args.model_name_or_path))
    settings = vision_settings(model_args) if is_composed else None
    config, tokenizer = read_config_and_tokenizer(model_args.model_name_or_path, settings)
    meter = LengthMeter(
        tokenizer,
        get_template(model_args.version),
        count_image_tokens(config),
        config.image_token_id,
        training_args.model_max_length,
    )
    report = check_data(
        data_args.data_path, data_args.image_folder, meter=meter, allow_truncation=training_args.allow_truncation
    )
    report.raise_if_bad()
    for warning in report.warnings:
        logger.warning("%s: %s", data_args.data_path, warning)
