"""Refusal of bad input before a model is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import LlavaConfig

from fuzzyroe.features import FEATURES
from fuzzyroe.rules import load_rule_base
from llava.conversation import get_template
from llava.data.records import RecordFile, resolve_image
from llava.train.arguments import (
    DEFAULT_RULE_BASE,
    DataArguments,
    LlavaTrainingArguments,
    ModelArguments,
    RoutingArguments,
)
from llava.train.stages import Stage, get_stage

MIN_FREE_BYTES = 64 * 2**20

MIN_CALIBRATION_SAMPLES = 8
"""One for each bin of scores that ``fuzzyroe.calibrate.calibrate_router`` makes."""


class StageInputError(ValueError):
    """Input that a stage cannot run on; the message names it and the remedy."""


def check_inputs(
    model_args: ModelArguments,
    data_args: DataArguments,
    routing_args: RoutingArguments,
    training_args: LlavaTrainingArguments,
) -> None:
    """Check everything that can be checked without a model.

    Raises:
        StageInputError: With what was found, what is allowed, what to do.
        KeyError: If the stage or the conversation template is unknown.
    """
    stage = get_stage(routing_args.stage)
    get_template(model_args.version)
    config, sources = _check_model(model_args.model_name_or_path)
    _check_routing(config.get("fuzzyroe"), stage, model_args.model_name_or_path, routing_args)
    _check_output(Path(training_args.output_dir), sources)
    _check_deepspeed(training_args, stage)
    checkpointing = training_args.gradient_checkpointing_kwargs or {}
    if training_args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise StageInputError(
            "use_reentrant=True cuts the gradient of routing silently; remove it (non-reentrant is the default)."
        )
    records = RecordFile(data_args.data_path)
    if not training_args.skip_data_check:
        _check_records(records, data_args.image_folder)
    _check_number(len(records), stage, routing_args, training_args.world_size)


def _check_routing(block: dict | None, stage: Stage, model_path: str, routing_args: RoutingArguments) -> None:
    """A stage that trains along the router's plans needs a calibrated router, a dense one none at all."""
    if stage.routing != "off" and not block:
        _check_rule_base(routing_args.rule_base or DEFAULT_RULE_BASE)
    if block and routing_args.rule_base is not None:
        raise StageInputError(
            f"--rule_base {routing_args.rule_base} was given, but {model_path} has a router already; leave it out, or "
            "start from a dense checkpoint."
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
    if stage.trains and stage.routing == "plan" and not block and routing_args.skip_pattern == "plan":
        raise StageInputError(
            f"Stage {stage.name} follows the plans of a calibrated router, but {model_path} has none; run the router "
            "stage first, or start with --skip_pattern random."
        )


def _check_rule_base(name: str) -> None:
    """The rule base must load, and its antecedents must be features."""
    unknown = [v.name for v in load_rule_base(name).antecedents if v.name not in FEATURES]
    if unknown:
        raise StageInputError(f"Rule base {name} has antecedents {unknown}, no features; use {', '.join(FEATURES)}.")


def _check_model(model_path: str) -> tuple[dict, list[Path]]:
    """Read the configuration, with the folders that the model's files lie in, none if it comes from the hub."""
    folder = Path(model_path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise StageInputError(f"{folder} holds no config.json; name a LLaVA checkpoint folder.")
    try:
        config, _ = LlavaConfig.get_config_dict(model_path)
    except OSError as error:
        if folder.exists():
            raise StageInputError(
                f"{folder / 'config.json'} cannot be read ({error}); write the checkpoint again."
            ) from error
        raise StageInputError(
            f"--model_name_or_path {model_path} is no folder, and its configuration cannot be had from the hub either; "
            "name a checkpoint folder, as an earlier stage writes it, or a hub id (owner/name)."
        ) from error
    if config.get("model_type") != "llava":
        raise StageInputError(
            f"{model_path} is a model of type {config.get('model_type')}; only llava can be trained. Name another."
        )
    if not folder.exists():
        return config, []
    base = (config.get("fuzzyroe") or {}).get("base_model")
    if base is None or not (base.startswith((".", "/")) or (folder / base).exists()):
        return config, [folder]
    if not (folder / base / "config.json").is_file():
        raise StageInputError(
            f"{model_path} holds no backbone weights and its base model is not at {folder / base}; put it there, or "
            "correct fuzzyroe.base_model in its config.json."
        )
    return config, [folder, folder / base]


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
    asked = {name: getattr(routing_args, name) for name in ("calibration_samples", "order_samples", "score_samples")}
    for name, number in asked.items():
        usable = min(found, number) // world_size * world_size
        needed = MIN_CALIBRATION_SAMPLES if name == "calibration_samples" else world_size
        if usable < needed:
            raise StageInputError(
                f"Stage {stage.name} would calibrate on {usable} samples ({found} records, --{name} {number}, "
                f"{world_size} processes); at least {needed} are needed. Give more."
            )


def _check_records(records: RecordFile, image_folder: str) -> None:
    """Read every record and look every image up (the files are opened by ``fuzzyroe check-data --decode``)."""
    if not Path(image_folder).is_dir():
        raise StageInputError(f"--image_folder {image_folder} is not a folder; name the one images lie in.")
    known: set[str] = set()
    for record in records:
        for relative in record.images:
            if relative in known:
                continue
            known.add(relative)
            try:
                path = resolve_image(image_folder, relative)
            except ValueError as error:
                raise StageInputError(f"{records.path}: record {record.index} (id {record.id!r}): {error}") from error
            if not path.stat().st_size:
                raise StageInputError(
                    f"{records.path}: record {record.index} (id {record.id!r}): image {relative} is empty; download it "
                    "again or drop the record."
                )
