"""Trapezoidal fuzzy sets as arrays of four numbers: left foot, left shoulder, right shoulder, right foot.

A triangle repeats its peak, a singleton repeats its value, so one set of formulas serves all three shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fuzzy_set(points: float | Sequence[float]) -> np.ndarray:
    """Make a set from a singleton (1 number), a triangle (3) or a trapezoid (4).

    Returns:
        The set, (4,).

    Raises:
        ValueError: If there are 2 or more than 4 numbers, or they decrease or are not finite.
    """
    values = np.atleast_1d(np.asarray(points, dtype=np.float64))
    picks = {1: [0, 0, 0, 0], 3: [0, 1, 1, 2], 4: [0, 1, 2, 3]}.get(values.size)
    if picks is None or not np.isfinite(values).all() or not is_valid(values):
        raise ValueError(
            f"{values.tolist()} is not a fuzzy set; 1 (singleton), 3 (triangle) or 4 (trapezoid) finite numbers that "
            "do not decrease are allowed; correct the numbers."
        )
    return values[picks]


def is_valid(points: np.ndarray, tolerance: float = 1e-9) -> bool:
    """Say whether the points of a set are in order, hence the set convex and normal."""
    return bool((np.diff(points) >= -tolerance).all())


def representative(sets: np.ndarray) -> np.ndarray:
    """Give the representative value ``(a0 + (a1 + a2) / 2 + a3) / 3`` of each set.

    Args:
        sets: Sets, (..., 4).

    Returns:
        Values, (...,).

    Reference:
        Huang and Shen, "Fuzzy interpolative reasoning via scale and move transformations", IEEE TFS 14(2), 2006.
    """
    return (sets[..., 0] + (sets[..., 1] + sets[..., 2]) / 2 + sets[..., 3]) / 3
