"""Routing policies of training: which layers the samples of a batch skip, asked anew for every batch.

A policy is called with a batch and the place of its step in the stage and gives the routing state of that batch. What
it draws comes from torch's default generator, which the trainer saves and restores, and it keeps nothing between
calls: a resumed run routes as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.attach import find_decoder
from fuzzyroe.routers.roe.tokens import RoEPass
from fuzzyroe.routers.roe.training import RoECompat, phase, relax, run_progress
from fuzzyroe.routing_state import Mode, RoutingState
from llava.model.families import get_image_token_id
from llava.train.arguments import PlanArguments, RoEArguments, StageArguments
from llava.train.stages import Stage

ANNEALED = 0.8
"""Share of an annealed stage after which its plans are hard."""


RoutingPolicy = Callable[[dict[str, Any], int, int], RoutingState]
"""Called with what the collator gives, the steps that the stage has taken, and the steps that it has, at least 1."""


@dataclass
class PerSourceBudgets:
    """The interval that each sample of a batch draws its budget from; ``source_of`` gives its source by its index.

    A source with a target t draws uniformly from the widest interval within [0, ``max_skip_ratio``] that is centred on
    t, so the mean of its budgets is t; other sources draw from all of [0, ``max_skip_ratio``].
    """

    targets: dict[str, float]
    max_skip_ratio: float
    source_of: Callable[[int], str]

    def intervals_of(self, sample_index: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest budget of samples, by their indices (B,); (B,) each, on the CPU."""
        middle, highest = self.max_skip_ratio / 2, self.max_skip_ratio  # the interval around the middle is all of it
        targets = [self.targets.get(self.source_of(index), middle) for index in sample_index.tolist()]
        low, high = torch.tensor([centred_interval(target, highest) for target in targets]).unbind(dim=1)
        return low, high


def centred_interval(target: float, highest: float) -> tuple[float, float]:
    """The widest interval within [0, ``highest``] whose middle is ``target``."""
    reach = min(target, highest - target)
    return target - reach, target + reach


@dataclass
class BudgetedRouting:
    """Routes every training sample at a budget of its own, uniform in [0, ``max_skip_ratio``], so that any is served.

    Attributes:
        image_token_id: Token id of image positions.
        dense_ratio: Share of samples that skip nothing, in [0, 1].
        mode: ``"soft"`` computes both branches of every layer, ``"hard"`` one for each row: that of its last turn.
        budgets: Narrower intervals for the samples of some sources; None for none.
        softness: Softness that plans start with, see ``FuzzyRouter.keep_weights``. It falls linearly to 0 at
            ``ANNEALED`` of the steps, so that the stage ends with the plans of inference; 0 plans hard throughout.
    """

    image_token_id: int
    max_skip_ratio: float
    dense_ratio: float = 0.0
    mode: Mode = "soft"
    budgets: PerSourceBudgets | None = None
    softness: float = 0.0

    def softness_at(self, progress: float) -> float:
        """Softness at a share of the steps, in [0, 1]."""
        return self.softness * max(0.0, 1 - progress / ANNEALED)

    def __call__(self, batch: dict[str, Any], step: int = 0, num_steps: int = 1) -> RoutingState:
        state = RoutingState.from_batch(batch, self.image_token_id, self.mode)
        num_samples = state.turn_ids.shape[0]
        low: Tensor | float = 0.0
        high: Tensor | float = self.max_skip_ratio
        if self.budgets is not None:
            low, high = self.budgets.intervals_of(batch["sample_index"])
        # torch's default generator on the CPU: its state is saved with every step, and no device has to wait
        drawn: Tensor = low + torch.rand(num_samples) * (high - low)
        drawn[torch.rand(num_samples) < self.dense_ratio] = 0.0
        state.target_skip_ratio = drawn.to(state.turn_ids.device)
        state.softness = self.softness_at(step / num_steps)
        return state


@dataclass
class RandomRouting:
    """Skips layers at random, without a router: each sample draws a rate, then each turn and layer a coin.

    Rates go up to ``max_skip_ratio``, over the layers that may be skipped; the first is always kept.

    Reference:
        RoE (arXiv:2407.14093) warms its adapters up with random skips.
    """

    image_token_id: int
    num_layers: int
    max_skip_ratio: float
    mode: Mode = "soft"

    def __call__(self, batch: dict[str, Any], step: int = 0, num_steps: int = 1) -> RoutingState:
        state = RoutingState.from_batch(batch, self.image_token_id, self.mode)
        num_samples, num_turns = len(state.turn_ids), state.planned_turns()
        rates = torch.rand(num_samples, 1, 1) * self.max_skip_ratio
        keep = (torch.rand(num_samples, num_turns, self.num_layers) >= rates).float()
        # routers never skip the first layer either: its input has seen no context
        keep[:, :, 0] = 1.0
        return state.forced(keep.to(state.turn_ids.device))


@dataclass
class RelaxedRouting:
    """Routes training samples softly, as RoE's schedule says at this moment of its run; a stage is a part of that run.

    The stage lies between the shares ``span`` of the run; ``skip_ratio`` is its target, in [0, 0.5].
    """

    image_token_id: int
    num_layers: int
    span: tuple[float, float]
    skip_ratio: float
    compat: RoECompat

    def progress_at(self, step: int, num_steps: int) -> float:
        """Share of the whole run that is done when this stage has taken ``step`` of its ``num_steps`` steps."""
        begin, end = self.span
        # the run is longer than the stage by the share that the stage is of it
        whole = num_steps / (end - begin)
        progress = run_progress(begin * whole + step, whole, self.compat)
        return min(max(progress, begin), end - 1e-6)  # a stage keeps to its phase, also where units are whole

    def __call__(self, batch: dict[str, Any], step: int = 0, num_steps: int = 1) -> RoutingState:
        state = RoutingState.from_batch(batch, self.image_token_id, "soft")
        progress, draws = self.progress_at(step, num_steps), None
        if phase(progress) == "random":
            draws = torch.rand(self.num_layers, len(state.turn_ids), state.planned_turns(), 2)
        state.roe = RoEPass(relax(progress, self.skip_ratio, draws))
        return state


def make_policy(
    stage: Stage, model: Any, stage_args: StageArguments, source_of: Callable[[int], str]
) -> RoutingPolicy | None:
    """Give the policy of a stage; None where nothing is skipped in training.

    Args:
        stage, stage_args: The stage, and the flags of its family.
        model: LLaVA model, routed if the stage is.
        source_of: Gives the source of a sample by its index in the training set.
    """
    image_token_id, num_layers = get_image_token_id(model.config), model.config.text_config.num_hidden_layers
    if isinstance(stage_args, RoEArguments) and stage.span is not None:
        router: Any = find_decoder(model).router
        return RelaxedRouting(image_token_id, num_layers, stage.span, stage_args.target_skip_ratio, router.compat)
    if not isinstance(stage_args, PlanArguments) or stage_args.skips_nothing:
        return None
    mode: Mode = "hard" if stage_args.train_hard_skip else "soft"
    largest, budgets = stage_args.max_skip_ratio, None
    if stage_args.skip_pattern == "random":
        return RandomRouting(image_token_id, num_layers, largest, mode)
    if stage_args.source_skip_ratios is not None:
        budgets = PerSourceBudgets(stage_args.source_targets(), largest, source_of)
    return BudgetedRouting(image_token_id, largest, stage_args.dense_ratio, mode, budgets, stage_args.anneal_softness)
