"""The end of a rank that makes no progress, with the layer and the batch at which it stopped."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fuzzyroe.attach import find_decoder_layers

GRACE_SECONDS = 5.0
"""How long a rank that has reported waits before it ends: the first one to end takes the others with it."""

STALLED = 70
"""Exit code of a rank that was ended."""


class Watchdog(TrainerCallback):
    """End this process when training stands still, saying where.

    Ranks that run different parts of a sharded model wait for each other for ever, and a collective's time-out says
    nothing of layers or data. Every rank reports for itself.

    Args:
        model: LLaVA model whose layers are followed.
        seconds: Time without progress after which the process ends.
        name_of: Name of a sample by its index in the training set.
        rank: Rank of this process.
    """

    def __init__(self, model: nn.Module, seconds: float, name_of: Callable[[int], str], rank: int) -> None:
        self.model, self.seconds, self.name_of, self.rank = model, seconds, name_of, rank
        self._place, self._step, self._batch = "the start of training", 0, None
        self._seen = time.monotonic()
        self._stop = threading.Event()
        self._handles: list[Any] = []

    def note(self, place: str) -> None:
        """Say where this rank is; any note counts as progress."""
        self._place, self._seen = place, time.monotonic()

    def begin_batch(self, inputs: dict[str, Any]) -> None:
        """Note the batch that comes next."""
        self._batch = inputs
        self.note("the start of the forward pass")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to watch."""
        places = {f"decoder layer {index}": layer for index, layer in enumerate(find_decoder_layers(self.model))}
        places |= {"vision tower": self.model.model.vision_tower, "projector": self.model.model.multi_modal_projector}
        for place, module in places.items():
            hook = self._hook(place)
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))  # ahead of gathering
        self.note("the first batch")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step."""
        self._step = state.global_step
        self.note("the beginning of a step")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the backward pass is done."""
        self.note("the optimizer step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the end of a step; what follows, logging and saving, has no time limit."""
        self.note("the end of a step")
        if control.should_save:
            self._seen = float("inf")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Watch again."""
        self.note("the end of a save")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        self._stop.set()
        for handle in self._handles:
            handle.remove()

    def report(self) -> str:
        """Where this rank is, and with which batch."""
        return (
            f"rank {self.rank}: no progress for {self.seconds:g} s at step {self._step}, last seen at {self._place}; "
            f"batch: {self._describe_batch()}. If other ranks stand elsewhere, they run different parts of the model: "
            "only whole decoder layers may differ, with --train_hard_skip under ZeRO-3. If they stand at the same "
            "place, it is slow, or a rank has died; --watchdog_seconds 0 turns this off."
        )

    def _describe_batch(self) -> str:
        if self._batch is None:
            return "none yet"
        batch: dict[str, Any] = self._batch
        shape = tuple(batch["input_ids"].shape)
        index: Tensor | None = batch.get("sample_index")
        names = "unknown" if index is None else ", ".join(map(self.name_of, index.tolist()))
        return f"samples {names}; {'with' if 'pixel_values' in batch else 'without'} images; (B, N) = {shape}"

    def _hook(self, place: str) -> Callable[..., None]:
        return lambda module, args: self.note(place)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._seen > self.seconds:
                print(self.report(), file=sys.stderr, flush=True)
                time.sleep(GRACE_SECONDS)
                os._exit(STALLED)
