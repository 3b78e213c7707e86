"""Everything that looks at the batches of a training run, and at nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from fuzzyroe.routing_state import RoutingState
from llava.data.dataset import SFTDataset
from llava.train.loss_guard import LossGuard
from llava.train.routing_metrics import RoutingMeter, Throughput
from llava.train.watchdog import Watchdog


@dataclass(frozen=True)
class Observers:
    """What is told of every batch.

    Attributes:
        guard: Ends a run that learns nothing.
        throughput: Counts samples and tokens.
        meter: Counts what is skipped; None without routing.
        watchdog: Ends a run that stands still; None where nobody watches.
    """

    guard: LossGuard
    throughput: Throughput
    meter: RoutingMeter | None = None
    watchdog: Watchdog | None = None

    def callbacks(self) -> list[TrainerCallback]:
        """Those that the trainer must call as well."""
        return [self.guard] if self.watchdog is None else [self.guard, self.watchdog]

    def before_forward(self, inputs: dict[str, Any]) -> None:
        """Tell of a batch that comes."""
        if self.watchdog is not None:
            self.watchdog.begin_batch(inputs)

    def after_forward(self, inputs: dict[str, Any], routing: RoutingState | None, loss: Tensor) -> None:
        """Tell of a batch whose loss is known."""
        if self.watchdog is not None:
            self.watchdog.note("the backward pass")
        self.guard.observe(loss, inputs["sample_index"])
        self.throughput.observe(inputs["attention_mask"])
        if self.meter is not None and routing is not None:
            self.meter.observe(routing, inputs["sample_index"])

    def take(self) -> dict[str, float]:
        """Numbers since the last call, by name; call on all ranks."""
        return {**({} if self.meter is None else self.meter.take()), **self.throughput.take()}


def name_of(dataset: SFTDataset, index: int) -> str:
    """Name a sample for a message: its place in the file, with the file's own identifier."""
    return f"{index} (id {dataset.records[index].id!r})"


def source_of(dataset: SFTDataset, index: int) -> str:
    """Source of a sample, as its record says."""
    return dataset.records[index].source
