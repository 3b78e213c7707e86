"""Trapezoidal fuzzy sets as arrays of four numbers: left foot, left shoulder, right shoulder, right foot.

A triangle repeats its peak, a singleton repeats its value, so one set of formulas serves all three shapes.

Reference:
    Huang and Shen, "Fuzzy interpolative reasoning via scale and move transformations", IEEE TFS 14(2), 2006.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Shape = float | Sequence[float]
"""A singleton (a number), a triangle (3 numbers) or a trapezoid (4)."""


def fuzzy_set(points: Shape) -> np.ndarray:
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
    """Give the representative value ``(a0 + (a1 + a2) / 2 + a3) / 3`` of each set, (..., 4) to (...,)."""
    return (sets[..., 0] + (sets[..., 1] + sets[..., 2]) / 2 + sets[..., 3]) / 3


@dataclass(frozen=True)
class Transformation:
    """Deformation of one set into another of the same representative value.

    Attributes:
        scale: Support of the target over support of the source, >= 0.
        top: Change of the share ``top / support`` as a part of what was possible, in [-1, 1].
        move: Shift of the feet as a part of what was possible, in [-1, 1].
    """

    scale: float = 1.0
    top: float = 0.0
    move: float = 0.0


def transformation_between(source: np.ndarray, target: np.ndarray) -> Transformation:
    """Find the transformation that deforms ``source`` into ``target``.

    Args:
        source: Set, (4,); only its shape counts where the representative values differ.
        target: Set, (4,).

    Returns:
        The transformation; the identity for a source without support.
    """
    support = source[3] - source[0]
    if support <= 0:
        return Transformation()
    target_support = target[3] - target[0]
    share = (source[2] - source[1]) / support
    target_share = (target[2] - target[1]) / target_support if target_support > 0 else share
    room = 1 - share if target_share >= share else share
    scale, top = float(target_support / support), _ratio(target_share - share, room)
    # what scaling leaves: the feet lie elsewhere around the representative value, so the peak must move
    scaled = _scale(source, scale, top)
    shift = (target[0] - representative(target)) - (scaled[0] - representative(scaled))
    slope = scaled[1] - scaled[0] if shift >= 0 else scaled[3] - scaled[2]
    return Transformation(scale, top, float(np.clip(_ratio(shift, slope / 3), -1, 1)))


def transform(fuzzy: np.ndarray, transformation: Transformation) -> np.ndarray:
    """Deform a set, (4,), into a valid set, (4,), of the same representative value."""
    scaled = _scale(fuzzy, transformation.scale, transformation.top)
    # feet and peak move against each other as far as the slope in the way allows
    slope = scaled[1] - scaled[0] if transformation.move >= 0 else scaled[3] - scaled[2]
    return scaled + transformation.move * slope / 3 * np.array([1.0, -2.0, -2.0, 1.0])


def _ratio(part: float, whole: float) -> float:
    """Divide; nothing out of nothing is nothing."""
    return float(part / whole) if whole > 0 else 0.0


def _scale(fuzzy: np.ndarray, scale: float, top: float) -> np.ndarray:
    """Change support and top, keeping the representative value and the proportion of the two slopes."""
    support = fuzzy[3] - fuzzy[0]
    if support <= 0:
        return fuzzy.copy()
    share = (fuzzy[2] - fuzzy[1]) / support
    share = share + top * (1 - share if top >= 0 else share)  # stays in [0, 1], hence the set valid
    left_slope, right_slope = fuzzy[1] - fuzzy[0], fuzzy[3] - fuzzy[2]
    slopes = left_slope + right_slope
    width = scale * support
    left = width * (1 - share) * (left_slope / slopes if slopes > 0 else 0.5)
    foot = representative(fuzzy) - (left + width * share / 2 + width) / 3
    return foot + np.array([0.0, left, left + width * share, width])
