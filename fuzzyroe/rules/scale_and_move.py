"""Fuzzy rule interpolation by scale and move transformations (T-FRI).

An intermediate rule is made whose antecedents have the representative values of the observation; what still deforms
each of its antecedents into the observed set (a scale of the feet, a change of the top, a move of the peak) deforms its
consequent likewise. The conclusion is always a convex, normal set. Singleton consequents have no shape to deform: only
the position counts.

Reference:
    Huang and Shen, IEEE TFS 14(2), 2006 (two flanking rules); IEEE TFS 16(1), 2008 (several closest rules,
    extrapolation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fuzzyroe.rules.fuzzy_set import representative


@dataclass(frozen=True)
class Transformation:
    """How one set deforms into another of the same representative value.

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
    scale, top = target_support / support, _ratio(target_share - share, room)
    scaled = _scale(source, scale, top)
    shift = (target[0] - representative(target)) - (scaled[0] - representative(scaled))
    slope = scaled[1] - scaled[0] if shift >= 0 else scaled[3] - scaled[2]
    return Transformation(scale, top, float(np.clip(_ratio(shift, slope / 3), -1, 1)))


def transform(fuzzy: np.ndarray, transformation: Transformation) -> np.ndarray:
    """Deform a set, keeping its representative value.

    Args:
        fuzzy: Set, (4,).
        transformation: What to do.

    Returns:
        A valid set, (4,).
    """
    scaled = _scale(fuzzy, transformation.scale, transformation.top)
    slope = scaled[1] - scaled[0] if transformation.move >= 0 else scaled[3] - scaled[2]
    return scaled + transformation.move * slope / 3 * np.array([1.0, -2.0, -2.0, 1.0])


def interpolate_flanking(observation: np.ndarray, antecedents: np.ndarray, consequents: np.ndarray) -> np.ndarray:
    """Interpolate between two rules that flank the observation.

    Args:
        observation: Observed sets, (D, 4).
        antecedents: Sets of the two rules, (2, D, 4).
        consequents: Their consequents, (2, 4).

    Returns:
        The conclusion, (4,).

    Raises:
        ValueError: If the two rules do not differ in any antecedent, or do not flank the observation.
    """
    first, second = representative(antecedents)  # (D,) each
    differs = first != second
    if not differs.any():
        raise ValueError(
            "The two rules have equal antecedents; flanking rules differ in at least one; choose other rules."
        )
    gap = np.where(differs, second - first, 1.0)
    ratios = np.where(differs, (representative(observation) - first) / gap, 0.0)
    if ratios.min() < 0 or ratios.max() > 1:
        raise ValueError(
            f"The observation lies at {ratios.tolist()} between the two rules; 0 to 1 is flanked; use closest rules."
        )
    intermediate = _mix(ratios[:, None], antecedents)
    conclusion = _mix(ratios[differs].mean(), consequents)
    return transform(conclusion, _mean_transformation(intermediate, observation))


def interpolate_closest(
    observation: np.ndarray,
    antecedents: np.ndarray,
    consequents: np.ndarray,
    ranges: np.ndarray,
    slopes: np.ndarray,
) -> np.ndarray:
    """Interpolate, or extrapolate, from N rules with weights ``1 / (1 + distance)`` per antecedent.

    Where the rules are centred beside the observation, the conclusion moves along ``slopes``, so that rules on a plane
    are continued exactly. Huang and Shen shift each antecedent by itself and take the range of the consequent divided
    by D for its slope; measured slopes (``SparseRules.slopes``) are closer on five of seven kinds of random monotone
    tables.

    Args:
        observation: Observed sets, (D, 4).
        antecedents: Sets of the N rules, (N, D, 4).
        consequents: Their consequents, (N, 4).
        ranges: Widths of the universes, (D,), for distances.
        slopes: Change of the conclusion along the whole universe of each antecedent, (D,).

    Returns:
        The conclusion, (4,); it can leave the hull of the consequents.
    """
    observed = representative(observation)
    distances = np.abs(representative(antecedents) - observed) / ranges  # (N, D)
    weights = 1 / (1 + distances)
    weights = weights / weights.sum(axis=0)
    intermediate = np.einsum("nd,ndp->dp", weights, antecedents)
    shares = weights.mean(axis=1)  # (N,)
    beside = (observed - shares @ representative(antecedents)) / ranges
    conclusion = shares @ consequents + slopes @ beside
    return transform(conclusion, _mean_transformation(intermediate, observation))


def _mean_transformation(intermediate: np.ndarray, observation: np.ndarray) -> Transformation:
    """Average the deformations over the antecedents, (D, 4) each."""
    parts = [transformation_between(*pair) for pair in zip(intermediate, observation, strict=True)]
    return Transformation(*(float(np.mean([getattr(p, key) for p in parts])) for key in ("scale", "top", "move")))


def _mix(ratio: np.ndarray | float, pair: np.ndarray) -> np.ndarray:
    """Give the point between two sets (or rows of sets)."""
    return (1 - ratio) * pair[0] + ratio * pair[1]


def _ratio(part: float, whole: float) -> float:
    """Divide, where nothing out of nothing is nothing."""
    return float(part / whole) if whole > 0 else 0.0


def _scale(fuzzy: np.ndarray, scale: float, top: float) -> np.ndarray:
    """Change support and top, keeping the representative value and the proportion of the two slopes."""
    support = fuzzy[3] - fuzzy[0]
    if support <= 0:
        return fuzzy.copy()
    share = (fuzzy[2] - fuzzy[1]) / support
    share = share + top * (1 - share if top >= 0 else share)
    left_slope, right_slope = fuzzy[1] - fuzzy[0], fuzzy[3] - fuzzy[2]
    slopes = left_slope + right_slope
    width = scale * support
    left = width * (1 - share) * (left_slope / slopes if slopes > 0 else 0.5)
    foot = representative(fuzzy) - (left + width * share / 2 + width) / 3
    return foot + np.array([0.0, left, left + width * share, width])
