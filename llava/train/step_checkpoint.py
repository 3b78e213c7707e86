"""Checkpoints within a stage: found whole or passed over, and refused where they belong to another run.

A step checkpoint is the folder ``OUTPUT.partial/checkpoint-N``. It is written below ``OUTPUT.partial/saving``, gets a
manifest once every process has written its share, and is renamed last; so a process killed at any moment leaves either
a whole checkpoint or none of that name. The manifest lists every file with its size, which tells a copy that was
cut short, and what the run was asked for, which tells another run's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.train.arguments import DataArguments, LlavaTrainingArguments, ModelArguments, StageArguments, stage_of
from llava.train.stages import StageInputError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SAVING = "saving"
"""Folder in which a step checkpoint is written before it is whole."""

PREFIX = "checkpoint-"

TRAINING_FLAGS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "mm_projector_lr",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "bf16",
    "fp16",
    "model_max_length",
    "group_by_modality_length",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "bits",
    "double_quant",
    "quant_type",
)
"""Training flags on which a step depends; another value makes another run."""


@dataclass(frozen=True)
class StepSaving:
    """What a trainer needs to save step checkpoints.

    Attributes:
        run: As ``describe_run`` says.
        write_model: Writes what evaluation reads into a folder, ``(trainer, folder)``; called on all ranks.
        facts: Gives what a resumed run needs besides its state, as JSON knows it.
    """

    run: dict[str, Any]
    write_model: Callable[[Any, Path], None]
    facts: Callable[[], dict[str, Any]]


def partial_folder(output: Path) -> Path:
    """Where a stage's output is written until it is whole, beside its final place."""
    return output.with_name(output.name + ".partial")


def describe_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    routing_args: StageArguments,
    training_args: LlavaTrainingArguments,
) -> dict[str, Any]:
    """What the steps of a run depend on, as JSON knows it; two runs that agree in it take the same steps."""
    stage = stage_of(model_args, routing_args, training_args)
    flags = {name: getattr(training_args, name) for name in TRAINING_FLAGS}
    data = Path(data_args.data_path)
    described = {
        "stage": stage.name,
        "trains": stage.trains,
        "world_size": training_args.world_size,
        "model_name_or_path": model_args.model_name_or_path,
        "version": model_args.version,
        "data_path": data_args.data_path,
        "data_bytes": data.stat().st_size,
        **asdict(routing_args),
        **flags,
    }
    return json.loads(json.dumps(described, default=str))


def publish(folder: Path, run: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Give a written step checkpoint its manifest and its name; call on one process when all have written.

    Args:
        folder: ``OUTPUT.partial/saving/checkpoint-N``.
        run: As ``describe_run`` says.
        facts: What a resumed run needs besides its state, as JSON knows it.

    Returns:
        ``OUTPUT.partial/checkpoint-N``.
    """
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps({"run": run, "facts": facts, "sizes": sizes}, indent=1) + "\n")
    for path in _files(folder):
        _flush(path)
    final = folder.parent.parent / folder.name
    if final.exists():
        shutil.rmtree(final)
    os.replace(folder, final)
    _flush(final.parent)
    return final


def rotate(partial: Path, limit: int | None) -> None:
    """Remove all but the newest ``limit`` step checkpoints; none of them if ``limit`` is None."""
    for folder in [] if limit is None else list_checkpoints(partial)[: -max(limit, 1)]:
        removed = partial / SAVING / f"removed-{folder.name}"
        os.replace(folder, removed)  # so that a kill leaves no part of it under its name
        shutil.rmtree(removed)


def list_checkpoints(partial: Path) -> list[Path]:
    """Step checkpoints of a folder by their step, oldest first, whole or not."""
    named = [path for path in partial.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(named, key=step_of)


def step_of(folder: Path) -> int:
    """Optimizer steps that a step checkpoint stands for, read from its name."""
    return int(folder.name.removeprefix(PREFIX))


def find_fault(folder: Path) -> str | None:
    """Why a step checkpoint cannot be resumed, None if it is whole."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["sizes"]
    except (OSError, ValueError, KeyError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``publish`` was given to remember."""
    return json.loads((folder / MANIFEST).read_text())["facts"]


def find_resume(asked: str, partial: Path, run: dict[str, Any]) -> Path | None:
    """Find the step checkpoint that a run goes on from.

    Args:
        asked: ``auto``: the newest whole one in ``partial``, or None if there is none; ``none``; or a folder.
        partial: ``OUTPUT.partial``.
        run: As ``describe_run`` says.

    Raises:
        StageInputError: If the folder asked for is no whole checkpoint, or the checkpoint belongs to another run.
    """
    if asked == "none":
        return None
    if asked != "auto":
        folder = Path(asked)
        fault = "it is no folder" if not folder.is_dir() else find_fault(folder)
        if fault is not None or not folder.name.startswith(PREFIX):
            raise StageInputError(
                f"--resume_from_checkpoint {asked} is no whole step checkpoint: {fault or 'its name has no step'}. "
                "Name a folder OUTPUT.partial/checkpoint-N, or use auto or none."
            )
        _refuse_other_run(folder, run)
        return folder
    for folder in reversed(list_checkpoints(partial)):
        fault = find_fault(folder)
        if fault is None:
            _refuse_other_run(folder, run)
            return folder
        logger.warning("%s is passed over: %s", folder, fault)
    return None


def _refuse_other_run(folder: Path, run: dict[str, Any]) -> None:
    """Compare what a checkpoint's run was asked for with this one."""
    saved = json.loads((folder / MANIFEST).read_text())["run"]
    if saved["stage"] != run["stage"]:
        raise StageInputError(
            f"{folder} was saved by stage {saved['stage']}, this is stage {run['stage']}; a stage goes on from its own "
            "checkpoints only and starts from what the stage before it wrote in the end. Name that as "
            "--model_name_or_path, with --resume_from_checkpoint none."
        )
    if saved["world_size"] != run["world_size"]:
        raise StageInputError(
            f"{folder} was saved by {saved['world_size']} processes, there are {run['world_size']} now; each holds its "
            f"own share of the optimizer. Start {saved['world_size']} processes, or begin this stage again with "
            "--resume_from_checkpoint none; between stages their number may change."
        )
    wrong = [name for name in sorted({*saved, *run}) if saved.get(name) != run.get(name)]
    if wrong:
        found = ", ".join(f"{name} {saved.get(name)} (now {run.get(name)})" for name in wrong[:4])
        raise StageInputError(
            f"{folder} was saved by a run with {found}; give the same flags to go on, or "
            "--resume_from_checkpoint none to begin this stage again."
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    """Have a file or a folder's entries on the disk before the next step, so that a power cut keeps their order."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
