"""RoE's training: the schedule of its soft decisions, its objective, and the switches to its published code.

The schedule is made of pure functions of the progress of a run, the share of it that is done. Nothing is counted or
stored: a resumed run computes what an uninterrupted one does, and any number of steps will do.

| Progress | Phase | Decision | Temperature | Bias |
|---|---|---|---|---|
| from 0 | ``random`` | drawn, whatever the router says | 0.001 | start bias b |
| from 0.3 | ``annealed`` | the router's | 10 * 0.95^k | b * 0.85^k |
| from 0.5 | ``free`` | the router's | 10 * 0.95^k | 0 |

k is 1 at progress 0.3 and grows by one with every further 0.005.

The objective of a sample with mean token loss t and skip rate s, under a target rho, is the answers' loss and a hinge
on the skip rate::

    t + exp(-damping * t) * max(0, rho - s)

The factor is a constant to the gradient: about 1 for a sample that is answered well, 0.08 at t = 0.5 and nothing at
t = 2, so a sample is pushed to skip only once it is easy. The mean is over samples, not over tokens.

Reference:
    RoE (arXiv:2407.14093), three-stage training and sparsity regularisation; constants from its published code.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.losses import IGNORED_LABEL, sample_losses

PHASES = {"random": 0.0, "annealed": 0.3, "free": 0.5}
"""Phase -> progress at which it begins."""

UNIT = 0.005
"""Share of the run between two steps of the decay; the published schedule cuts a run into such units."""

START_TEMPERATURE, TEMPERATURE_DECAY, BIAS_DECAY = 10.0, 0.95, 0.85

# low enough that all but 0.8 % of drawn decisions are 0 or 1 to three digits
DRAW_TEMPERATURE = 0.001

# progress is a quotient of whole numbers; one that should be a multiple of ``UNIT`` may miss it by this share
ROUNDING = 1e-9
DAMPING = 5.0


@dataclass(frozen=True)
class RoECompat:
    """Switches for the choices in which RoE's published code differs from this implementation, which is the default.

    Every switch changes data that the one implementation works on (where routing tokens stand, which positions they
    read, a number); none selects other code for the same thing.

    Attributes:
        tokens_in_front: Routing tokens stand before the prompt; each reads itself and its own segment only, which lies
            behind it. By default each stands behind its segment and reads all that lies before it, causally.
        image_segment_takes_one_more: In training the segment of the image has the first position of the question too.
            By default it ends where the question begins, in training as at inference.
        tokens_take_positions: In training routing tokens count as the first positions of the sequence; at inference
            each has position 1. By default each has the position of what it stands behind, and moves nothing.
        ties_skip: A layer whose two logits are equal is skipped. By default it is kept.
        batch_decides_together: A layer runs for the whole batch if one row keeps it. By default every row decides.
        whole_units: The schedule counts whole units of steps (1/200 of the run, rounded down), so phases end early and
            the temperature falls too far in short runs. By default it follows the exact progress.
        damping: How fast the hinge of the objective fades with the loss. The published evaluation code, which can
            train too, has 1.
    """

    tokens_in_front: bool = False
    image_segment_takes_one_more: bool = False
    tokens_take_positions: bool = False
    ties_skip: bool = False
    batch_decides_together: bool = False
    whole_units: bool = False
    damping: float = DAMPING

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoECompat:
        """Read what ``to_dict`` gave; an unknown switch is a ``ValueError``."""
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"Unknown RoE switches {unknown}; known are {', '.join(known)}. Correct the router's options."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The switches as JSON knows them."""
        return asdict(self)


OURS = RoECompat()
PUBLISHED = RoECompat(**{item.name: True for item in fields(RoECompat) if item.name != "damping"})
"""What the published training and evaluation do, so that their numbers can be compared with ours."""

PRESETS = {"ours": OURS, "published": PUBLISHED, "front": RoECompat(tokens_in_front=True)}
"""Sets of switches by name: ``front`` has the published layout and attention rules without the off-by-ones."""


@dataclass(frozen=True)
class Relaxation:
    """How logits of keeping and skipping become keep weights in training: ``softmax((z + [bias, 0]) / temperature)``.

    Attributes:
        temperature: Above 0; towards 0 decisions become hard.
        bias: Added to the logit of keeping.
        draws: Logits that stand in for the router's, (L, B, T, 2); None asks the router.
    """

    temperature: float = 1.0
    bias: float = 0.0
    draws: Tensor | None = None


def run_progress(step: float, num_steps: float, compat: RoECompat = OURS) -> float:
    """Share of a run that is done, as the schedule counts it; above 1 is possible with ``whole_units``.

    Raises:
        ValueError: If whole units are asked for in a run that is shorter than their number.
    """
    if not compat.whole_units:
        return step / num_steps
    # rounded down, as published: short runs reach the end of the schedule early
    num_units = round(1 / UNIT)
    unit = int(num_steps / num_units)
    if unit < 1:
        raise ValueError(
            f"A run of {num_steps:g} steps has no whole unit of 1/{num_units}; at least {num_units} steps are "
            "needed. Switch whole_units off, or train longer."
        )
    return int(step) / (num_units * unit)


def start_bias(skip_ratio: float) -> float:
    """Bias under which drawn decisions skip at a rate rho in [0, 0.5]: ``1 - sqrt(2 rho)``.

    Two numbers u, v uniform in [0, 1) meet ``v > u + b`` with probability ``(1 - b)^2 / 2``.

    Raises:
        ValueError: If the rate lies outside: two equal logits skip half of the time, and a bias only keeps.
    """
    if not 0 <= skip_ratio <= 0.5:
        raise ValueError(f"Skip ratio {skip_ratio} lies outside [0, 0.5], which a bias can reach; choose one inside.")
    return 1 - math.sqrt(2 * skip_ratio)


def phase(progress: float) -> str:
    """Name of the phase that a run is in, a key of ``PHASES``."""
    return max((start, name) for name, start in PHASES.items() if progress >= start - ROUNDING)[1]


def temperature(progress: float) -> float:
    """Temperature of the decisions, above 0."""
    if phase(progress) == "random":
        return DRAW_TEMPERATURE
    return START_TEMPERATURE * TEMPERATURE_DECAY ** _num_decays(progress)


def bias(progress: float, skip_ratio: float) -> float:
    """Bias towards keeping, at least 0, for a target skip ratio in [0, 0.5]."""
    current = phase(progress)
    if current == "free":
        return 0.0
    return start_bias(skip_ratio) * (BIAS_DECAY ** _num_decays(progress) if current == "annealed" else 1.0)


def relax(progress: float, skip_ratio: float, draws: Tensor | None = None) -> Relaxation:
    """Everything that the schedule says at one moment.

    Args:
        progress: Share of the run that is done.
        skip_ratio: Target skip ratio, in [0, 0.5].
        draws: Numbers uniform in [0, 1), (L, B, T, 2); needed in the random phase and only there.

    Raises:
        ValueError: If draws are missing, or given where the router decides.
    """
    # draws where the router decides would train it on decisions that it did not take
    if (phase(progress) == "random") != (draws is not None):
        found = "no draws" if draws is None else "draws"
        raise ValueError(
            f"Progress {progress:.3f} lies in the {phase(progress)} phase and was given {found}; give draws in the "
            "random phase, below 0.3, and leave them out behind it."
        )
    return Relaxation(temperature(progress), bias(progress, skip_ratio), draws)


def _num_decays(progress: float) -> int:
    return math.floor((progress - PHASES["annealed"]) / UNIT + ROUNDING) + 1


@dataclass(frozen=True)
class Objective:
    """The objective of a batch, with its parts.

    Attributes:
        loss: What is minimised, a scalar.
        task: Mean token loss of each sample, (B,).
        hinge: ``max(0, rho - s)`` of each sample, (B,).
        skip_rate: Skip rate s of each sample, (B,).
    """

    loss: Tensor
    task: Tensor
    hinge: Tensor
    skip_rate: Tensor


def sample_skip_rates(keep_weights: Tensor, turn_mask: Tensor) -> Tensor:
    """Mean skip weight of each sample over its turns and all layers, (B,); 0 for a sample without turns.

    The system prompt and the image do not count, although they are routed too. Shapes as in ``routing_objective``.
    """
    skipped = (1 - keep_weights.mean(dim=2)) * turn_mask
    return skipped.sum(dim=1) / turn_mask.sum(dim=1).clamp(min=1)


def routing_objective(
    logits: Tensor,
    labels: Tensor,
    keep_weights: Tensor,
    turn_mask: Tensor,
    skip_ratio: float,
    damping: float = DAMPING,
    weight: float = 1.0,
) -> Objective:
    """The objective of a batch; a sample without labels has no part in the mean.

    Args:
        logits: (B, N, V).
        labels: Token ids, ``IGNORED_LABEL`` where nothing is learned, (B, N).
        keep_weights: Keep weights in [0, 1], (B, T, L).
        turn_mask: Which turns each sample has, (B, T) bool.
        skip_ratio: Target rho.
        damping: How fast the hinge fades with the loss.
        weight: Weight of the hinge, 1 in RoE.
    """
    task, skip_rate = sample_losses(logits, labels), sample_skip_rates(keep_weights, turn_mask)
    hinge = (skip_ratio - skip_rate).clamp(min=0)
    # detached: the factor weighs the hinge, and must not teach the model to answer badly
    damped = weight * torch.exp(-damping * task.detach()) * hinge
    # a sample without labels has loss 0, which would count as answered perfectly
    has_labels = (labels[:, 1:] != IGNORED_LABEL).any(dim=1)
    loss = ((task + damped.to(task.device)) * has_labels).sum() / has_labels.sum().clamp(min=1)
    return Objective(loss, task.detach(), hinge.detach(), skip_rate.detach())
