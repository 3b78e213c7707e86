"""Refusal of bad input before a model is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from llava.conversation import get_template
from llava.data.records import RecordFile, resolve_image
from llava.train.arguments import DataArguments, LlavaTrainingArguments, ModelArguments, RoutingArguments
from llava.train.stages import get_stage

MIN_FREE_BYTES = 64 * 2**20


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
    get_stage(routing_args.stage)
    get_template(model_args.version)
    _check_model_folder(model_args.model_name_or_path)
    _check_output(training_args.output_dir)
    _check_deepspeed(training_args)
    checkpointing = training_args.gradient_checkpointing_kwargs or {}
    if training_args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise StageInputError(
            "use_reentrant=True cuts the gradient of routing silently; remove it (non-reentrant is the default)."
        )
    if not training_args.skip_data_check and training_args.process_index == 0:
        _check_records(data_args)


def _check_model_folder(model_path: str) -> None:
    folder = Path(model_path)
    if not folder.exists():
        if model_path.startswith((".", "/")) or model_path.count("/") != 1:
            raise StageInputError(
                f"--model_name_or_path {model_path} does not exist; name a checkpoint folder or a hub id (owner/name)."
            )
        return
    if not (folder / "config.json").is_file():
        raise StageInputError(f"{folder} holds no config.json; name a LLaVA checkpoint folder.")


def _check_output(output_dir: str) -> None:
    parent = Path(output_dir).absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise StageInputError(f"{parent} cannot be written; choose another --output_dir.")
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE_BYTES:
        raise StageInputError(
            f"{parent} has {free / 2**20:.0f} MiB free, at least {MIN_FREE_BYTES // 2**20} MiB are needed; make room."
        )


def _check_deepspeed(training_args: LlavaTrainingArguments) -> None:
    """A DeepSpeed JSON must leave the optimizer to the trainer, and must be able to save."""
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


def _check_records(data_args: DataArguments) -> None:
    """Read every record and look every image up (the files are opened by ``fuzzyroe check-data --decode``)."""
    if not Path(data_args.image_folder).is_dir():
        raise StageInputError(f"--image_folder {data_args.image_folder} is not a folder; name the one images lie in.")
    records = RecordFile(data_args.data_path)
    if not len(records):
        raise StageInputError(f"{records.path} holds no records; choose another --data_path.")
    known: set[str] = set()
    for record in records:
        for relative in record.images:
            if relative in known:
                continue
            known.add(relative)
            try:
                path = resolve_image(data_args.image_folder, relative)
            except ValueError as error:
                raise StageInputError(f"{records.path}: record {record.index} (id {record.id!r}): {error}") from error
            if not path.stat().st_size:
                raise StageInputError(
                    f"{records.path}: record {record.index} (id {record.id!r}): image {relative} is empty; download it "
                    "again or drop the record."
                )
