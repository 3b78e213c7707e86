"""Schedule of RoE's soft decisions, as pure functions of the progress of a run.

Progress is the share of the run that is done, 0 at its first step. Nothing is counted or stored: a resumed run computes
what an uninterrupted one does, and any number of steps will do.

| Progress | Phase | Decision | Temperature | Bias |
|---|---|---|---|---|
| from 0 | ``random`` | drawn, whatever the router says | 0.001 | start bias b |
| from 0.3 | ``annealed`` | the router's | 10 * 0.95^k | b * 0.85^k |
| from 0.5 | ``free`` | the router's | 10 * 0.95^k | 0 |

k is 1 at progress 0.3 and grows by one with every further 0.005.

Reference:
    RoE (arXiv:2407.14093), three-stage training; constants from its published code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

PHASES = {"random": 0.0, "annealed": 0.3, "free": 0.5}
"""Phase -> progress at which it begins."""

UNIT = 0.005
"""Share of the run between two steps of the decay."""

START_TEMPERATURE, TEMPERATURE_DECAY, BIAS_DECAY = 10.0, 0.95, 0.85

DRAW_TEMPERATURE = 0.001
"""Temperature of drawn decisions: low enough that all but 0.8 % of them are 0 or 1 to three digits."""

ROUNDING = 1e-9
"""Progress is a quotient of whole numbers; one that should be a multiple of ``UNIT`` may miss it by this share."""


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


def start_bias(skip_ratio: float) -> float:
    """Bias under which drawn decisions skip at a rate: ``1 - sqrt(2 rho)``.

    Two numbers u, v uniform in [0, 1) meet ``v > u + b`` with probability ``(1 - b)^2 / 2``.

    Args:
        skip_ratio: Wanted rate rho, in [0, 0.5].

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
