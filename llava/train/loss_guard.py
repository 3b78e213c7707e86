"""The end of a run that learns nothing: a loss of exactly zero, or no number, for many steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MAX_BAD_STEPS = 10

MAX_NAMED = 20
"""Samples that the message names."""


class LossGuard(TrainerCallback):
    """Stop a run whose loss has been exactly 0, nan or infinite for some steps on end.

    Such a run goes on for hours without a sign: masked labels give a loss of 0, and a trainer leaves nan out of the
    losses that it logs.

    Args:
        name_of: Name of a sample by its index in the training set.
        max_bad_steps: Steps on end after which the run stops.
    """

    def __init__(self, name_of: Callable[[int], str], max_bad_steps: int = MAX_BAD_STEPS) -> None:
        self.name_of, self.max_bad_steps = name_of, max_bad_steps
        self._batch: list[tuple[Tensor, Tensor]] = []
        self._bad_steps = 0
        self._samples: deque[int] = deque(maxlen=MAX_NAMED)

    def observe(self, loss: Tensor, sample_index: Tensor) -> None:
        """Note the loss of a batch, a scalar, and its samples, (B,)."""
        self._batch.append((loss.detach(), sample_index))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the batches of a step.

        Raises:
            RuntimeError: Once too many steps on end were bad on this rank.
        """
        batch, self._batch = self._batch, []
        if not batch:
            return
        losses = torch.stack([loss.float() for loss, _ in batch]).cpu()
        if losses.isfinite().all() and bool((losses != 0).any()):
            self._bad_steps = 0
            self._samples.clear()
            return
        self._bad_steps += 1
        self._samples.extend(index for _, indices in batch for index in indices.tolist())
        if self._bad_steps >= self.max_bad_steps:
            found = "exactly 0" if bool((losses == 0).all()) else f"{float(losses[~losses.isfinite()][0])}"
            raise RuntimeError(
                f"The loss was {found} for {self._bad_steps} steps on end, up to step {state.global_step}, on rank "
                f"{args.process_index}; a loss is a number above 0. Its last samples: "
                f"{', '.join(map(self.name_of, self._samples))}. Look at their labels with fuzzyroe check-data, at "
                "--version if it is 0, at learning rate and precision if it is nan."
            )
