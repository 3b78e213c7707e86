"""Sparse rules: fuzzy sets on both sides, and no rule for much of what can be observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fuzzyroe.rules.fuzzy_set import fuzzy_set, representative

Shape = float | Sequence[float]
"""A singleton (a number), a triangle (3 numbers) or a trapezoid (4)."""


@dataclass(frozen=True, eq=False)
class SparseRules:
    """N rules over D antecedents.

    Attributes:
        antecedents: Their sets, (N, D, 4).
        consequents: Their conclusions, (N, 4).
        ranges: Widths of the universes of the antecedents, > 0, (D,).
        signs: Directions of their effects: 1, -1, or 0 (unknown), (D,).
    """

    antecedents: np.ndarray
    consequents: np.ndarray
    ranges: np.ndarray
    signs: np.ndarray

    @classmethod
    def from_shapes(
        cls,
        rules: Sequence[tuple[Sequence[Shape], Shape]],
        ranges: Sequence[float] | None = None,
        signs: Sequence[int] | None = None,
    ) -> SparseRules:
        """Make rules from numbers.

        Args:
            rules: Pairs of D antecedents and a consequent.
            ranges: Widths of the universes; None takes what the antecedents of the rules span.
            signs: Directions of the effects; None for unknown.

        Raises:
            ValueError: If there is no rule, a shape is no fuzzy set, or rules have different numbers of antecedents.
        """
        lengths = {len(antecedents) for antecedents, _ in rules}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"The rules have {sorted(lengths)} antecedents; one or more rules with equally many are allowed; "
                "correct them."
            )
        sets = np.array([[fuzzy_set(shape) for shape in antecedents] for antecedents, _ in rules])
        span = np.ptp(sets, axis=(0, 2))
        widths = np.where(span > 0, span, 1.0) if ranges is None else np.asarray(ranges, dtype=np.float64)
        directions = np.zeros(lengths.pop()) if signs is None else np.asarray(signs)
        return cls(sets, np.array([fuzzy_set(shape) for _, shape in rules]), widths, directions)

    @cached_property
    def positions(self) -> np.ndarray:
        """Representative values of the antecedents, in units of their universes, (N, D)."""
        return self.positions_of(self.antecedents)

    @cached_property
    def slopes(self) -> np.ndarray:
        """Change of the conclusion along the whole universe of each antecedent, by least squares over the rules, (D,).

        A slope against its declared direction counts as zero, and so does one along which no two rules differ.
        """
        positions, values = self.positions, representative(self.consequents)
        centred = positions - positions.mean(axis=0)
        found = np.linalg.lstsq(centred, values - values.mean(), rcond=None)[0]
        return np.where(found * self.signs < 0, 0.0, found)

    def positions_of(self, sets: np.ndarray) -> np.ndarray:
        """Give the representative values of sets (..., D, 4) in units of the universes, (..., D)."""
        return representative(sets) / self.ranges

    def closest(self, observation: np.ndarray, count: int) -> np.ndarray:
        """Give the numbers of the ``count`` rules closest to an observation (D, 4); of equal ones the first."""
        distances = np.linalg.norm(self.positions - self.positions_of(observation), axis=1).round(12)
        return np.argsort(distances, kind="stable")[:count]

    def flanking_pairs(self, observation: np.ndarray) -> list[np.ndarray]:
        """Find the rules next to an observation (D, 4) on both sides along one antecedent, all others equal.

        Returns:
            Numbers of two rules each: the narrowest pair, or all of them when several are equally narrow.
        """
        steps = self.positions - self.positions_of(observation)  # (N, D)
        is_same = np.isclose(steps, 0, rtol=0, atol=1e-9)
        pairs, widths = [], []
        for axis, along in enumerate(steps.T):
            is_on_line = np.delete(is_same, axis, axis=1).all(axis=1) & ~is_same[:, axis]
            below, above = np.flatnonzero(is_on_line & (along < 0)), np.flatnonzero(is_on_line & (along > 0))
            if below.size and above.size:
                pair = np.array([below[np.argmax(along[below])], above[np.argmin(along[above])]])
                pairs.append(pair)
                widths.append(np.ptp(along[pair]))
        return [pair for pair, width in zip(pairs, widths, strict=True) if np.isclose(width, min(widths))]
