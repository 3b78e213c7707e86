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
from llava.train.stages import PARTS, Stage

logger = logging.getLogger(__name__)


class MovementCheck(TrainerCallback):
    """Compare gathered weights with those before training: frozen parts early and late, trained parts until they moved.

    A trained part may stand still for some steps and be right: warm-up starts at rate zero, a batch whose plans skip no
    layer gives adapters no gradient, and a small step can vanish in half precision or be left out on overflow. So it is
    looked at again after 1, 2, 4, 8, ... steps, and only a part that never moved is an error.

    Args:
        model: The model that trains.
        stage: Names the parts that must move; every parameter of every other part must keep its bits.
        moved: What had moved when a resumed run was saved.

    Attributes:
        moved: Part -> whether it moved; complete once training has ended.
    """

    def __init__(self, model: nn.Module, stage: Stage, moved: dict[str, bool] | None = None) -> None:
        self.model, self.stage = model, stage
        self.moved: dict[str, bool] = {**dict.fromkeys(PARTS, False), **(moved or {})}
        self._before: dict[str, dict[str, int]] = {}
        self._learning_rate = 0.0
        self._num_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take fingerprints."""
        self._before = {part: self._fingerprints(part) for part in PARTS}
        self._num_steps = 0

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
        """Compare after the first step at a non-zero rate; what has not moved yet again after 2, 4, 8, ... of them.

        Raises:
            RuntimeError: If a frozen parameter moved.
        """
        if self._learning_rate == 0:
            return
        self._num_steps += 1
        if self._num_steps == 1:
            self._compare(PARTS)
        elif self._num_steps & (self._num_steps - 1) == 0:  # a power of two
            self._compare(self.stage.trains)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare for the last time.

        Raises:
            RuntimeError: If a frozen parameter moved, or a part that trains never did.
        """
        if self._num_steps == 0:
            logger.warning("stage %s took no step at a non-zero learning rate; nothing was trained", self.stage.name)
            return
        self._compare(PARTS)
        for part in self.stage.trains:
            if not self.moved[part] and self._before[part]:
                raise RuntimeError(
                    f"Stage {self.stage.name} trains the {part}, but none of its parameters moved in "
                    f"{self._num_steps} steps; raise its learning rate or the number of steps."
                )
        logger.info("stage %s moved %s and nothing else", self.stage.name, ", ".join(self.stage.trains))
        self._before = {}

    def _compare(self, parts: tuple[str, ...]) -> None:
        for part in parts:
            if self.moved[part]:
                continue
            after = self._fingerprints(part)
            changed = [name for name, value in self._before[part].items() if after[name] != value]
            self.moved[part] = bool(changed)
            if changed and part not in self.stage.trains:
                raise RuntimeError(
                    f"Stage {self.stage.name} freezes the {part}, but {changed[:3]} moved; set requires_grad=False "
                    "before the optimizer is made, and leave its groups alone."
                )

    def _fingerprints(self, part: str) -> dict[str, int]:
        """Checksums of the parameters of a part; gathers, so call on all ranks."""
        return map_parameters(parameters_by_part(self.model)[part], _fingerprint)


def _fingerprint(tensor: Tensor) -> int:
    """Checksum of a tensor's bits."""
    return zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
