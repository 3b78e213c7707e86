"""Refusal of bad input before a model is loaded: what needs files, packages, DeepSpeed's configuration or the data.

Values of single flags are checked by their dataclasses (``arguments.py``), flags of another stage by the parser.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from fuzzyroe.features import FEATURES
from fuzzyroe.routers import get_router_class, plan_router_names
from fuzzyroe.rules import load_rule_base
from llava.conversation import get_template
from llava.data.check import check_data
from llava.data.preprocess import LengthMeter
from llava.data.records import RecordFile
from llava.model.checkpoints.contents import read_projector
from llava.model.checkpoints.files import is_language_model, read_config_dict
from llava.model.checkpoints.reading import read_config_and_tokenizer
from llava.model.families import count_image_tokens, get_image_token_id
from llava.train.arguments import (
    DEFAULT_RULE_BASE,
    FULL_BITS,
    Arguments,
    LlavaTrainingArguments,
    ModelArguments,
    PlanArguments,
    RoutedArguments,
    StageArguments,
    require,
    stage_of,
)
from llava.train.checkpointing import describe_run, find_resume, partial_folder
from llava.train.load_model import check_agreement, vision_settings
from llava.train.stages import STAGES, Stage, StageInputError

logger = logging.getLogger(__name__)

ATTACH_FLAGS = ("router", "rule_base", "adapter_hidden_dim", "routing_summary", "roe_compat")
"""Flags that act when routing is first attached; a routed checkpoint has its own."""

MIN_FREE_MIB, MIN_CALIBRATION_SAMPLES = 64, 8
"""Of the output's disk; and one for each bin of scores that ``FuzzyRouter.calibrate`` makes."""


def check_inputs(arguments: Arguments) -> None:
    """Check everything that can be checked without a model.

    Raises:
        ValueError, KeyError, OSError, ImportError: With what was found, what is allowed, what to do.
    """
    model_args, data_args, stage_args, training_args = arguments
    stage = stage_of(arguments)
    get_template(model_args.version)
    # cheapest first: files that are read in a second, then packages, then every record and image
    config, sources, read = _check_model(model_args, stage)
    _check_packages(stage, training_args)
    _check_routing(config.get("fuzzyroe"), stage, model_args.model_name_or_path, stage_args)
    output = Path(str(training_args.output_dir))
    _check_output(output, sources)
    _check_deepspeed(stage, stage_args, training_args)
    if not training_args.skip_data_check:
        _check_records(arguments, *read)
    _check_sources(stage_args, data_args.data_path)
    if stage.calibrates:
        _check_number(len(RecordFile(data_args.data_path)), stage, stage_args, training_args.world_size)
    # a step checkpoint of another run is refused now, not after the model was loaded
    find_resume(training_args.resume_from_checkpoint, partial_folder(output), describe_run(arguments))


def _check_model(model_args: ModelArguments, stage: Stage) -> tuple[dict[str, Any], list[Path], tuple[Any, Any]]:
    """A model's configuration as written, its folders (none from the hub), and configuration and tokenizer as read."""
    path = model_args.model_name_or_path
    config, folder = read_config_dict(path), Path(path)
    settings = None  # a language model gets its image tokens from the vision settings, a LLaVA checkpoint has them
    if is_language_model(config):
        if stage.routing != "off":
            raise StageInputError(
                f"{path} is a language model, stage {stage.name} routes a LLaVA checkpoint; run the stages pretrain "
                "and dense first, or name a LLaVA checkpoint."
            )
        settings = vision_settings(model_args)
    read = read_config_and_tokenizer(path, settings)  # refuses, by name, what belongs to no family
    if settings is None:
        check_agreement(config, model_args)
    if model_args.pretrain_mm_mlp_adapter is not None:
        read_projector(model_args.pretrain_mm_mlp_adapter, read[0])  # refuses one that does not fit
    if not folder.exists():
        return config, [], read
    if (folder / "adapter_config.json").exists():
        raise StageInputError(
            f"{path} holds LoRA weights of another model; a whole checkpoint is needed. Merge them first: "
            f"fuzzyroe convert {path} OUTPUT."
        )
    # stages that train no backbone write none; their checkpoint names the one it belongs to
    base = (config.get("fuzzyroe") or {}).get("base_model")
    if base is None or not (base.startswith((".", "/")) or (folder / base).exists()):
        return config, [folder], read
    if not (folder / base / "config.json").is_file():
        raise StageInputError(
            f"{path} holds no backbone weights and its base model is not at {folder / base}; put it there, or "
            "correct fuzzyroe.base_model in its config.json."
        )
    return config, [folder, folder / base], read


def _check_packages(stage: Stage, training_args: LlavaTrainingArguments) -> None:
    """What a flag needs must be installed, and quantized weights must not be partitioned."""
    bits, loggers = training_args.bits, set(training_args.report_to or ())
    if bits != FULL_BITS and training_args.deepspeed and training_args.hf_deepspeed_config.is_zero3():
        raise StageInputError(
            f"--bits {bits} was given under ZeRO-3, which cannot partition quantized weights; use scripts/zero2.json, "
            "or leave --bits out."
        )
    # transformers takes a missing logger for one that was not asked for
    needed: dict[str, str] = {name: f"--report_to {name}" for name in ("wandb", "tensorboard") if name in loggers}
    needed |= {"peft": "--lora_enable"} if "lora" in stage.trains else {}
    needed |= {"bitsandbytes": f"--bits {bits}"} if bits != FULL_BITS else {}
    for package, flag in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{flag} was given but {package} is not installed; pip install {package}, or leave it out."
            )


def _check_routing(block: dict[str, Any] | None, stage: Stage, path: str, stage_args: StageArguments) -> None:
    """The ``fuzzyroe`` block of a checkpoint, None for a dense one, must be what the stage goes on with."""
    if not isinstance(stage_args, RoutedArguments):
        if block:
            raise StageInputError(
                f"{path} is routed, stage {stage.name} trains dense models; name its base model, or another --stage."
            )
        return
    # a router that is there goes on; else one is attached, which needs its rule base
    if block:
        _check_attached(block, stage, path, stage_args)
    elif isinstance(stage_args, PlanArguments):
        name = stage_args.rule_base or DEFAULT_RULE_BASE
        unknown = [v.name for v in load_rule_base(name).antecedents if v.name not in FEATURES]
        if unknown:
            raise StageInputError(
                f"Rule base {name} has antecedents {unknown}, no features; use {', '.join(FEATURES)}."
            )
        if stage.trains and stage_args.follows_plans:
            raise StageInputError(
                f"Stage {stage.name} follows the plans of a calibrated router, but {path} has none; run the router "
                "stage first, or start with --skip_pattern random."
            )
    elif stage.span is not None and stage.span[0] > 0 and not stage_args.freeze_adapters:
        raise StageInputError(
            f"Stage {stage.name} goes on with adapters that are trained, but {path} is dense; run roe_adapter first."
        )
    if isinstance(stage_args, PlanArguments):
        router = (block or {}).get("router") or stage_args.router or plan_router_names()[0]
        # static and random routers rank nothing, so rules, tables and softness have nothing to act on
        acting = () if get_router_class(router).is_scored else ("rule_base", "per_layer_tables", "anneal_softness")
        remedy = f"was given, but a {router} router has no score; leave it out, or use --router fuzzy."
        for flag in acting:
            require(not getattr(stage_args, flag), flag, getattr(stage_args, flag), remedy)


def _check_attached(block: dict[str, Any], stage: Stage, path: str, stage_args: RoutedArguments) -> None:
    """A router that is there is gone on with, so it must be of the stage's method and is not chosen again."""
    router, is_planned = block.get("router", "fuzzy"), stage.routing == "plan"
    # layer-wise routers are RoE's; all others are planned
    if is_planned == get_router_class(router).decides_layer_wise:
        family = [name for name, other in STAGES.items() if other.routing == ("relaxed" if is_planned else "plan")]
        raise StageInputError(
            f"{path} is routed by a {router} router, which stage {stage.name} does not train; use one of the stages "
            f"{', '.join(family)}, or start from a dense checkpoint."
        )
    width = block.get("adapter_width")
    for flag in ATTACH_FLAGS:
        value, is_width = getattr(stage_args, flag, None), flag == "adapter_hidden_dim"
        has = f"has adapters of width {width}" if is_width else "has a router already"
        # the width may be repeated, as scripts give it to every stage
        remedy = f"was given, but {path} {has}; leave it out, or start from a dense checkpoint."
        require(value is None or is_width and value == width, flag, value, remedy)


def _check_output(output: Path, sources: list[Path]) -> None:
    """The output must be writable and must not replace what it is made from."""
    given = f"--output_dir {output}"
    if output.resolve() in [source.resolve() for source in sources]:
        raise StageInputError(f"{given} is the folder that the model is read from; choose another, so that it stays.")
    # the nearest folder that exists decides; lexists, as a dangling link is in the way too
    parent = output.absolute()
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise StageInputError(f"{parent} is a file, {given} needs a folder there; choose another.")
    if not os.access(parent, os.W_OK):
        raise StageInputError(f"{parent} cannot be written; choose another --output_dir.")
    free = shutil.disk_usage(parent).free / 2**20
    if free < MIN_FREE_MIB:
        raise StageInputError(f"{parent} has {free:.0f} MiB free, at least {MIN_FREE_MIB} MiB are needed; make room.")


def _check_deepspeed(stage: Stage, stage_args: StageArguments, training_args: LlavaTrainingArguments) -> None:
    """A DeepSpeed JSON must leave the optimizer to the trainer, be able to save, and suit what the stage runs."""
    name: Any = training_args.deepspeed
    config = json.loads(Path(name).read_text()) if isinstance(name, str) else name or {}
    zero = config.get("zero_optimization", {})
    zero_stage, num_ranks = zero.get("stage", 0), training_args.world_size
    # the trainer makes the optimizer: its groups have a rate per part
    if "optimizer" in config:
        raise StageInputError(
            f"{name} has an 'optimizer' entry, which would silently drop the learning rates by part; remove it."
        )
    if zero_stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise StageInputError(
            f"{name} cannot save under ZeRO-3; set zero_optimization.stage3_gather_16bit_weights_on_model_save to true."
        )
    if config and not stage.trains and zero_stage != 3:
        raise StageInputError(
            f"{name} has ZeRO stage {zero_stage}; stage {stage.name} only runs forward passes, which DeepSpeed does "
            "with ZeRO stage 3 alone. Use scripts/zero3.json, or leave --deepspeed out."
        )
    # ZeRO-3 gathers whole layers as leaf modules, so ranks may skip different ones
    skips_hard = isinstance(stage_args, PlanArguments) and stage_args.train_hard_skip
    if skips_hard and num_ranks > 1 and zero_stage != 3:
        raise StageInputError(
            f"--train_hard_skip was given with {num_ranks} processes and ZeRO stage {zero_stage}, where ranks that "
            "skip different layers exchange gradients of different parameters; use scripts/zero3.json, or leave it out."
        )


def _check_records(arguments: Arguments, config: Any, tokenizer: Any) -> None:
    """Look at every record, every image and the lengths, as ``fuzzyroe check-data`` does."""
    model_args, data_args, _, training_args = arguments
    template, longest = get_template(model_args.version), training_args.model_max_length
    meter = LengthMeter(tokenizer, template, count_image_tokens(config), get_image_token_id(config), longest)
    report = check_data(
        data_args.data_path, data_args.image_folder, meter=meter, allow_truncation=training_args.allow_truncation
    )
    report.raise_if_bad()
    for warning in report.warnings:
        logger.warning("%s: %s", data_args.data_path, warning)


def _check_sources(stage_args: StageArguments, data_path: str) -> None:
    """Every source with a target of its own must have a record; records are read until all were seen."""
    targets = stage_args.source_targets() if isinstance(stage_args, PlanArguments) else {}
    seen: set[str] = set()
    for record in RecordFile(data_path) if targets else ():
        seen.add(record.source)
        if seen.issuperset(targets):
            return
    unknown = [source for source in targets if source not in seen]
    if unknown:
        raise StageInputError(
            f"--source_skip_ratios names {', '.join(unknown)}, but the sources of {data_path} are "
            f"{', '.join(sorted(seen))}; name one of these (the first folder of an image, text without one)."
        )


def _check_number(num_records: int, stage: Stage, stage_args: StageArguments, world_size: int) -> None:
    """Fitting needs samples in every bin of scores and, for each of its passes, on every process."""
    for name in ("calibration_samples", "order_samples", "score_samples", "budget_samples"):
        asked = getattr(stage_args, name, None)  # a family has the flags that its routers read
        # ranks measure equal shares; what is left over is not used
        usable = min(num_records, asked or 0) // world_size * world_size
        needed = MIN_CALIBRATION_SAMPLES if name == "calibration_samples" else world_size
        if asked is not None and usable < needed:
            raise StageInputError(
                f"Stage {stage.name} would calibrate on {usable} samples ({num_records} records, --{name} {asked}, "
                f"{world_size} processes); at least {needed} are needed. Give more."
            )
