"""A save in miniature before the first step, so that a run cannot fail at its last."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer

from llava.model.builder import Checkpoint
from llava.train.engine import gather_parameters
from llava.train.stages import StageInputError

FOLDER = "rehearsal"

BYTES_PER_TRAINED = 16
"""Of a step checkpoint, per trained parameter: weight, two moments and gradient scale of AdamW in float32."""


def rehearse_save(trainer: Trainer, checkpoint: Checkpoint, folder: Path) -> None:
    """Write and read again one of everything that the stage will write, then remove it; call on all ranks.

    Args:
        trainer: Trainer before its first step.
        checkpoint: What the stage starts from.
        folder: Where the stage will write.

    Raises:
        StageInputError: If there is not enough room for what the stage will write.
        RuntimeError: If a tensor comes back with another shape.
    """
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    tensors = gather_parameters(dict(list(trained.items())[:1]))
    if trainer.args.process_index != 0:
        return
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    try:
        trainer.model.config.save_pretrained(target)
        if trainer.model.generation_config is not None:
            trainer.model.generation_config.save_pretrained(target)
        checkpoint.tokenizer.save_pretrained(target)
        checkpoint.image_processor.save_pretrained(target)
        if tensors:
            save_file(tensors, target / "one.safetensors")
            _compare(target / "one.safetensors", trained)
    finally:
        shutil.rmtree(target)
    _check_room(trainer, trained, folder)


def _compare(file: Path, trained: dict[str, nn.Parameter]) -> None:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            found, wanted = tuple(opened.get_slice(name).get_shape()), _shape(trained[name])
            if found != wanted:
                raise RuntimeError(f"{name} has shape {wanted} but was saved as {found}; weights cannot be gathered.")


def _check_room(trainer: Trainer, trained: dict[str, nn.Parameter], folder: Path) -> None:
    """The stage's output and its step checkpoints must fit on the disk."""
    count = sum(_count(parameter) for parameter in trained.values())
    needed = 4 * count
    if trainer.args.save_strategy.value != "no":
        number = 1 + (trainer.args.save_total_limit or 1)  # the newest is written before the oldest is removed
        needed += number * BYTES_PER_TRAINED * count
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StageInputError(
            f"{folder} has {free / 2**30:.1f} GiB free, this stage will write {needed / 2**30:.1f} GiB; make room, "
            "or save fewer step checkpoints (--save_total_limit, --save_strategy no)."
        )


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 has sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _count(parameter: nn.Parameter) -> int:
    """Number of values of the whole parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())
