"""The consequent of a rule base: the name, the universe and the output range of what the rules conclude."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fuzzyroe.rules.variable import check_identifier, check_interval


@dataclass(frozen=True)
class Consequent:
    """What the rules conclude.

    Attributes:
        name: Identifier of the conclusion.
        universe: Range in which the rules are written.
        rescale: Range of the output; the affine map from ``universe`` keeps the order. None: the universe itself.
    """

    name: str
    universe: tuple[float, float]
    rescale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "universe", tuple(float(bound) for bound in self.universe))
        check_identifier(self.name, "The name of a consequent")
        check_interval(self.universe, f"The universe of '{self.name}'")
        if self.rescale is not None:
            object.__setattr__(self, "rescale", tuple(float(bound) for bound in self.rescale))
            check_interval(self.rescale, f"The rescale range of '{self.name}'")

    @property
    def output_range(self) -> tuple[float, float]:
        """Smallest and largest output."""
        return self.universe if self.rescale is None else self.rescale

    def to_output(self, values: np.ndarray) -> np.ndarray:
        """Map values of the universe to the output range, any shape."""
        return _affine(values, self.universe, self.output_range)

    def from_output(self, values: np.ndarray) -> np.ndarray:
        """Map outputs back to the universe, any shape."""
        return _affine(values, self.output_range, self.universe)

    def contains(self, value: float) -> bool:
        """Say whether a value is finite and inside the universe."""
        return math.isfinite(value) and self.universe[0] <= value <= self.universe[1]


def _affine(values: np.ndarray, source: tuple[float, float], target: tuple[float, float]) -> np.ndarray:
    """Map ``source`` onto ``target``; equal ranges leave every bit alone."""
    values = np.asarray(values, dtype=np.float64)
    if source == target:
        return values.copy()
    scaled = target[0] + (values - source[0]) * ((target[1] - target[0]) / (source[1] - source[0]))
    return np.clip(scaled, *target)  # rounding only: nan (no rule) stays nan
