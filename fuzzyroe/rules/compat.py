"""The published crisp router, for comparison: boxes, and between them the two nearest box centres.

Kept as published: boxes are open at the top, so a feature of exactly 1.0 and negative ones match none; scores jump
across box borders and exceed 1. The default inference replaces it (see ``inference``).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from fuzzyroe.rules.yaml_io import load_rule_base

BORDERS = np.array([0.0, 0.33, 0.67, 1.0])


def published_score(points: np.ndarray) -> np.ndarray:
    """Give the published score.

    Args:
        points: Published features (image entropy, text entropy, cosine), (n, 3).

    Returns:
        Raw scores in [0, 1.5]: the matching box, else the two nearest, (n,).
    """
    matched = match_box(points)
    return np.where(np.isnan(matched), interpolate_nearest_two(points), matched)


def match_box(points: np.ndarray) -> np.ndarray:
    """Give the consequent of the box a point lies in.

    Args:
        points: Published features, (n, 3).

    Returns:
        Raw consequents, nan where no rule has the box, (n,).
    """
    levels = np.digitize(np.asarray(points, dtype=np.float64), BORDERS) - 1  # (n, 3); -1 below, 3 at or above 1.0
    inside = ((levels >= 0) & (levels < 3)).all(axis=1)
    return np.where(inside, _published_table()[tuple(levels.clip(0, 2).T)], np.nan)


def interpolate_nearest_two(points: np.ndarray) -> np.ndarray:
    """Weigh the two nearest of the fifteen box centres by the distance to the other one.

    Args:
        points: Published features, (n, 3).

    Returns:
        Raw scores, (n,); of equally near boxes the first in the order of the rules is taken.
    """
    table = _published_table()
    cells = np.argwhere(~np.isnan(table))
    centres = ((BORDERS[:-1] + BORDERS[1:]) / 2)[cells]  # (15, 3)
    distances = np.sqrt(np.square(np.asarray(points, dtype=np.float64)[:, None] - centres).sum(axis=-1))  # (n, 15)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :2]
    first, second = np.take_along_axis(distances, nearest, axis=1).T
    total = first + second
    share = np.where(total > 0, first / np.where(total > 0, total, 1.0), 0.5)
    values = table[tuple(cells.T)][nearest]  # (n, 2)
    return (1 - share) * values[:, 0] + share * values[:, 1]


@cache
def _published_table() -> np.ndarray:
    """Give the raw consequents, nan for the twelve boxes without a rule, (3, 3, 3)."""
    return load_rule_base("published_raw").table
