"""The routing state of a training batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fuzzyroe.routing_state import Mode, RoutingState
from llava.train.per_source_budgets import SourceTargets

ANNEALED = 0.8
"""Share of an annealed stage after which its plans are hard."""


class BudgetedRouting:
    """Routes every training sample at a budget of its own, so that one checkpoint serves any.

    Args:
        image_token_id: Token id of image positions.
        max_skip_ratio: Largest budget.
        dense_ratio: Share of samples that skip nothing, in [0, 1].
        mode: ``"soft"`` computes both branches of every layer, ``"hard"`` one for each row: that of its last turn.
        targets: Narrower intervals for the samples of some sources; None for none.

    A call draws budgets uniform in [0, ``max_skip_ratio``] from torch's default generator, which the trainer saves and
    restores, so a resumed run draws the same.
    """

    def __init__(
        self,
        image_token_id: int,
        max_skip_ratio: float,
        dense_ratio: float = 0.0,
        mode: Mode = "soft",
        targets: SourceTargets | None = None,
    ) -> None:
        self.image_token_id = image_token_id
        self.mode = mode
        self.max_skip_ratio = max_skip_ratio
        self.dense_ratio = dense_ratio
        self.targets = targets

    def __call__(self, inputs: dict[str, Any]) -> RoutingState:
        state = RoutingState.from_batch(inputs, self.image_token_id, self.mode)
        num_samples = state.turn_ids.shape[0]
        low, high = 0.0, self.max_skip_ratio
        if self.targets is not None:
            low, high = self.targets.intervals_of(inputs["sample_index"])
        budgets: Tensor = low + torch.rand(num_samples) * (high - low)
        budgets[torch.rand(num_samples) < self.dense_ratio] = 0.0
        state.target_skip_ratio = budgets.to(state.turn_ids.device)
        return state


class AnnealedRouting(BudgetedRouting, TrainerCallback):
    """Routes along soft plans that harden as the stage goes on, so that it ends with the plans of inference.

    The softness falls linearly from its start to 0 at ``ANNEALED`` of the steps and stays there; it depends on the step
    alone, so a resumed stage goes on where it was.

    Args:
        image_token_id, max_skip_ratio, dense_ratio, targets: As for ``BudgetedRouting``.
        softness: What it starts with, above 0; see ``FuzzyRouter.keep_weights``.
    """

    def __init__(
        self,
        image_token_id: int,
        max_skip_ratio: float,
        dense_ratio: float,
        softness: float,
        targets: SourceTargets | None = None,
    ) -> None:
        super().__init__(image_token_id, max_skip_ratio, dense_ratio, targets=targets)
        self.start = self.softness = softness

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how soft the next step is."""
        self.softness = self.softness_at(state.global_step / state.max_steps)

    def softness_at(self, progress: float) -> float:
        """Softness at a share of the steps, in [0, 1]."""
        return self.start * max(0.0, 1 - progress / ANNEALED)

    def __call__(self, inputs: dict[str, Any]) -> RoutingState:
        state = super().__call__(inputs)
        state.softness = self.softness
        return state


class RandomRouting:
    """Skips layers at random, without a router: each sample draws a rate, then each turn and layer a coin.

    Args:
        image_token_id: Token id of image positions.
        num_layers: Layers of the decoder; the first is always kept.
        max_skip_ratio: Largest rate over the layers that may be skipped.
        mode: ``"soft"`` computes both branches of every layer, ``"hard"`` one for each row: that of its last turn.

    Reference:
        RoE (arXiv:2407.14093) warms its adapters up with random skips.
    """

    def __init__(self, image_token_id: int, num_layers: int, max_skip_ratio: float, mode: Mode = "soft") -> None:
        self.image_token_id = image_token_id
        self.mode = mode
        self.num_layers = num_layers
        self.max_skip_ratio = max_skip_ratio

    def __call__(self, inputs: dict[str, Any]) -> RoutingState:
        state = RoutingState.from_batch(inputs, self.image_token_id, self.mode)
        rates = torch.rand(state.turn_ids.shape[0], 1, 1) * self.max_skip_ratio
        keep = (torch.rand(state.turn_ids.shape[0], state.num_turns, self.num_layers) >= rates).float()
        keep[:, :, 0] = 1.0
        return state.forced(keep.to(state.turn_ids.device))
