"""How RoE's stages route a training batch, and what they minimise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fuzzyroe.routers.roe.compat import RoECompat, run_progress
from fuzzyroe.routers.roe.objective import Objective, routing_objective
from fuzzyroe.routers.roe.schedule import phase, relax
from fuzzyroe.routers.roe.tokens import RoEPass
from fuzzyroe.routing_state import RoutingState


class RelaxedRouting(TrainerCallback):
    """Routes training samples softly, as RoE's schedule says at this moment of its run.

    A stage is a part of that run. Where the stage stands is read from the trainer at each step, so a resumed stage goes
    on where it was. Drawn decisions come from torch's default generator, which the trainer saves and restores.

    Args:
        image_token_id: Token id of image positions.
        num_layers: Layers of the decoder, L.
        span: Shares of the run between which the stage lies.
        skip_ratio: Target skip ratio, in [0, 0.5].
        compat: ``whole_units`` acts on the schedule.
    """

    def __init__(
        self, image_token_id: int, num_layers: int, span: tuple[float, float], skip_ratio: float, compat: RoECompat
    ) -> None:
        self.image_token_id = image_token_id
        self.num_layers = num_layers
        self.span = span
        self.skip_ratio = skip_ratio
        self.compat = compat
        self.progress = span[0]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where in the run the next step stands."""
        self.progress = self.progress_at(state.global_step, state.max_steps)

    def progress_at(self, step: int, num_steps: int) -> float:
        """Share of the whole run that is done when this stage has taken some of its steps.

        Args:
            step: Optimizer steps taken.
            num_steps: Optimizer steps of the stage, at least 1.
        """
        begin, end = self.span
        whole = num_steps / (end - begin)
        progress = run_progress(begin * whole + step, whole, self.compat)
        return min(max(progress, begin), end - 1e-6)  # a stage keeps to its phase, also where units are whole

    def __call__(self, inputs: dict[str, Any]) -> RoutingState:
        state = RoutingState.from_batch(inputs, self.image_token_id, "soft")
        draws: Tensor | None = None
        if phase(self.progress) == "random":
            draws = torch.rand(self.num_layers, state.turn_ids.shape[0], state.num_turns, 2)
        state.roe = RoEPass(relax(self.progress, self.skip_ratio, draws))
        return state


class RoEObjective:
    """RoE's objective, with running means of its parts.

    Args:
        skip_ratio: Target skip ratio, in [0, 0.5].
        damping: How fast the hinge fades with a sample's loss.
        weight: Weight of the hinge, 1 in RoE; 0 trains without this regularisation.
    """

    def __init__(self, skip_ratio: float, damping: float, weight: float = 1.0) -> None:
        self.skip_ratio, self.damping, self.weight = skip_ratio, damping, weight
        self._parts: list[Objective] = []

    def __call__(self, logits: Tensor, labels: Tensor, routing: RoutingState) -> Tensor:
        """Loss of a batch, a scalar.

        Args:
            logits: (B, N, V).
            labels: (B, N).
            routing: State of the forward pass that gave the logits.
        """
        keep_weights, turn_mask = routing.result.keep_weights, routing.turn_mask()
        found = routing_objective(logits, labels, keep_weights, turn_mask, self.skip_ratio, self.damping, self.weight)
        self._parts.append(replace(found, loss=found.loss.detach()))
        return found.loss

    def take_means(self) -> dict[str, Tensor]:
        """Means over the batches since the last call, by name, scalars on the device; empty if there were none."""
        parts, self._parts = self._parts, []
        if not parts:
            return {}
        return {
            "routing/task_loss": torch.cat([part.task for part in parts]).mean(),
            "routing/hinge": torch.cat([part.hinge for part in parts]).mean(),
        }
