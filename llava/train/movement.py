"""Proof that a stage trains what it names and nothing else."""

from __future__ import annotations

import logging
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.train.engine import map_parameters
from llava.train.param_groups import parameters_by_part
from llava.train.stages import Stage

logger = logging.getLogger(__name__)


class MovementCheck(TrainerCallback):
    """After the first optimizer step at a non-zero learning rate, compare gathered weights with those before it.

    Args:
        model: The model that trains.
        stage: Names the parts that must move; every parameter of every other part must keep its bits.

    Attributes:
        moved: Part -> whether it moved, once checked.
    """

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self.model, self.stage = model, stage
        self.moved: dict[str, bool] = {}
        self._before: dict[str, dict[str, int]] = {}
        self._learning_rate = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take fingerprints."""
        self._before = self._fingerprints()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Note the learning rate of the step to come; warm-up starts at zero."""
        self._learning_rate = max(group["lr"] for group in optimizer.param_groups)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare, once.

        Raises:
            RuntimeError: If a part that trains stood still, or a frozen parameter moved.
        """
        if self.moved or self._learning_rate == 0:
            return
        after = self._fingerprints()
        for part, before in self._before.items():
            changed = [name for name, value in before.items() if after[part][name] != value]
            self.moved[part] = bool(changed)
            if part in self.stage.trains and before and not changed:
                raise RuntimeError(f"Stage {self.stage.name} trains the {part}, but none of its parameters moved.")
            if part not in self.stage.trains and changed:
                raise RuntimeError(f"Stage {self.stage.name} freezes the {part}, but {changed[:3]} moved.")
        logger.info("stage %s moved %s and nothing else", self.stage.name, ", ".join(self.stage.trains))
        self._before = {}

    def _fingerprints(self) -> dict[str, dict[str, int]]:
        return {part: map_parameters(named, _fingerprint) for part, named in parameters_by_part(self.model).items()}


def _fingerprint(tensor: Tensor) -> int:
    """Checksum of a tensor's bits."""
    return zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
