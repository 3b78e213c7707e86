"""Fuzzy rule interpolation: conclusions of sparse rules from observations that fire none of them.

Sets may be singletons, triangles or trapezoids on both sides, kept as arrays of four numbers: left foot, left shoulder,
right shoulder, right foot. Interpolation runs when a rule base is built, never in a forward pass. A rule table is
completed by observing the terms of each missing cell; its consequents are singletons, of which only the position
counts.

Reference:
    Koczy and Hirota, "Approximate reasoning by linear rule interpolation and general approximation", IJAR 9, 1993;
    Tikk, Joo, Koczy et al., "Stability of interpolative fuzzy KH controllers", FSS 125, 2002 (all rules);
    Huang and Shen, IEEE TFS 14(2), 2006 (scale and move, two flanking rules); IEEE TFS 16(1), 2008 (several closest
    rules, extrapolation).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fuzzyroe.rules.fitting import project_missing

Shape = float | Sequence[float]
"""A singleton (a number), a triangle (3 numbers) or a trapezoid (4)."""

_CLOSEST = re.compile(r"closest_([1-9][0-9]*)")


@dataclass(frozen=True)
class InterpolationOptions:
    """Choice of method and rules for an observation without a rule.

    Attributes:
        method: A key of ``METHODS``.
        selection: Rules to use: ``"flanking"`` (the pairs on both sides along one antecedent) or ``"closest_N"``.
        fallback: ``"closest_N"`` for observations that no pair flanks.
        monotone: Whether a completed table is projected onto the declared directions, with the given cells held.
    """

    method: str = "scale_and_move"
    selection: str = "flanking"
    fallback: str = "closest_3"
    monotone: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise KeyError(
                f"Unknown interpolation method {self.method!r}; known: {sorted(METHODS)}; choose one of them."
            )
        for name, also in (("selection", ("flanking",)), ("fallback", ())):
            value = getattr(self, name)
            if value not in also and not _CLOSEST.fullmatch(value):
                allowed = " or ".join(f"'{choice}'" for choice in (*also, "closest_N"))
                raise ValueError(f"{name} is {value!r}; {allowed} is allowed; write for instance 'closest_3'.")

    @property
    def num_closest(self) -> int:
        """N of the ``closest_N`` in use."""
        return int((self.fallback if self.selection == "flanking" else self.selection).removeprefix("closest_"))


@dataclass(frozen=True, eq=False)
class SparseRules:
    """N rules over D antecedents, with fuzzy sets on both sides, and no rule for much of what can be observed.

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

    @cached_property
    def positions(self) -> np.ndarray:
        """Representative values of the antecedents, in units of their universes, (N, D)."""
        return representative(self.antecedents) / self.ranges

    @cached_property
    def slopes(self) -> np.ndarray:
        """Change of the conclusion along the whole universe of each antecedent, by least squares over the rules, (D,).

        A slope against its declared direction counts as zero, and so does one along which no two rules differ.
        """
        values = representative(self.consequents)
        centred = self.positions - self.positions.mean(axis=0)
        fitted = np.linalg.lstsq(centred, values - values.mean(), rcond=None)[0]
        return np.where(fitted * self.signs < 0, 0.0, fitted)

    def steps_from(self, observation: np.ndarray) -> np.ndarray:
        """Give the way from an observation (D, 4) to each rule, in units of the universes, (N, D)."""
        return self.positions - representative(observation) / self.ranges

    def closest(self, observation: np.ndarray, count: int) -> np.ndarray:
        """Give the numbers of the ``count`` rules closest to an observation (D, 4); of equal ones the first."""
        # rounded: rules at equal distance must tie, so that their order decides and not the last bit
        distances = np.linalg.norm(self.steps_from(observation), axis=1).round(12)
        return np.argsort(distances, kind="stable")[:count]

    def flanking_pairs(self, observation: np.ndarray) -> list[np.ndarray]:
        """Find the rules next to an observation (D, 4) on both sides along one antecedent, all others equal.

        Gives the numbers of two rules: the narrowest pair, or all of them when several are equally narrow.
        """
        steps = self.steps_from(observation)
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

    def conclude(self, observation: np.ndarray, options: InterpolationOptions) -> np.ndarray:
        """Conclude from an observation (D, 4), whose own rule decides alone if there is one; (4,)."""
        own = np.flatnonzero((self.antecedents == observation).all(axis=(1, 2)))
        if own.size:
            return self.consequents[own].mean(axis=0)
        return METHODS[options.method](self, observation, options)


def conclude(
    rules: Sequence[tuple[Sequence[Shape], Shape]],
    observation: Sequence[Shape],
    method: str = "scale_and_move",
    *,
    ranges: Sequence[float] | None = None,
    signs: Sequence[int] | None = None,
    **options: str,
) -> np.ndarray:
    """Conclude from one observation by fuzzy rule interpolation.

    The benchmark of the literature: two rules over triangles, and an observation between them.

    >>> rules = [([(0, 5, 6)], (0, 2, 4)), ([(11, 13, 14)], (10, 11, 13))]
    >>> conclude(rules, [(7, 8, 9)]).round(2).tolist()
    [5.84, 6.26, 6.26, 7.38]

    Args:
        rules: Pairs of D antecedents and a consequent; each set a number, a triangle or a trapezoid.
        observation: One set per antecedent.
        method: A key of ``METHODS``.
        ranges: Widths of the universes of the antecedents; None takes what the rules span.
        signs: Directions of their effects, 1, -1 or 0 (unknown); None for unknown.
        **options: ``selection`` and ``fallback``, see ``InterpolationOptions``.

    Returns:
        The conclusion as a trapezoid, (4,).

    Raises:
        ValueError: If a shape is no fuzzy set, sets and antecedents differ in number, or the method cannot conclude.
    """
    lengths = {len(antecedents) for antecedents, _ in rules}
    if not observation or lengths != {len(observation)}:
        raise ValueError(
            f"The observation has {len(observation)} sets; {' or '.join(map(str, sorted(lengths)))} are allowed: all "
            "rules and the observation have equally many, one or more; add or remove some."
        )
    sets = np.array([[fuzzy_set(shape) for shape in antecedents] for antecedents, _ in rules])
    span = np.ptp(sets, axis=(0, 2))
    sparse = SparseRules(
        sets,
        np.array([fuzzy_set(shape) for _, shape in rules]),
        np.where(span > 0, span, 1.0) if ranges is None else np.asarray(ranges, dtype=np.float64),
        np.zeros(len(observation)) if signs is None else np.asarray(signs),
    )
    return sparse.conclude(
        np.array([fuzzy_set(shape) for shape in observation]),
        InterpolationOptions(method, **options),  # type: ignore[arg-type]  # selection and fallback are texts
    )


def complete_table(
    table: np.ndarray,
    term_sets: Sequence[np.ndarray],
    ranges: np.ndarray,
    signs: np.ndarray,
    options: InterpolationOptions,
) -> np.ndarray:
    """Conclude every missing cell of a rule table from the given ones.

    Given cells keep every bit. Conclusions are clipped to the hull of the given consequents.

    Args:
        table: Consequents, nan where there is no rule, (K_1, ..., K_D).
        term_sets: Terms of each antecedent as fuzzy sets, D arrays of (K_j, 4).
        ranges: Widths of the universes of the antecedents, (D,).
        signs: Directions of their effects: 1, -1, or 0 (unknown), (D,).
        options: Method, selection of rules, projection.

    Raises:
        ValueError: If the method cannot conclude some cell, saying which and what to use instead.
    """
    is_given = ~np.isnan(table)

    def sets_of(cells: np.ndarray) -> np.ndarray:  # (N, D) to (N, D, 4)
        return np.stack([sets[cells[:, axis]] for axis, sets in enumerate(term_sets)], axis=1)

    singletons = np.repeat(table[is_given][:, None], 4, axis=1)  # (N, 4)
    rules = SparseRules(sets_of(np.argwhere(is_given)), singletons, ranges, signs)
    completed, missing = table.copy(), np.argwhere(~is_given)
    for cell, observation in zip(map(tuple, missing.tolist()), sets_of(missing), strict=True):
        try:
            completed[cell] = representative(rules.conclude(observation, options))
        except ValueError as error:
            raise ValueError(f"Cell {cell}: {error}") from error
    hull = np.nanmin(table), np.nanmax(table)
    completed = completed.clip(*hull)
    # clipped again: projection rounds, and a consequent just outside its universe would be refused
    return project_missing(completed, is_given, signs).clip(*hull) if options.monotone else completed


def interpolate_flanking(observation: np.ndarray, antecedents: np.ndarray, consequents: np.ndarray) -> np.ndarray:
    """Interpolate between two rules that flank the observation, by scale and move transformations (T-FRI).

    An intermediate rule is made whose antecedents have the representative values of the observation; the deformation
    that still separates each of its antecedents from the observed set is applied to its consequent.

    Args:
        observation: Observed sets, (D, 4).
        antecedents: Sets of the two rules, (2, D, 4).
        consequents: Their consequents, (2, 4).

    Returns:
        The conclusion, (4,); always a convex, normal set.

    Raises:
        ValueError: If the two rules do not differ in any antecedent, or do not flank the observation.
    """
    first, second = representative(antecedents)  # (D,) each
    differs = first != second
    if not differs.any():
        raise ValueError("The two rules have equal antecedents; they differ in at least one; choose other rules.")
    gap = np.where(differs, second - first, 1.0)
    ratios = np.where(differs, (representative(observation) - first) / gap, 0.0)
    if ratios.min() < 0 or ratios.max() > 1:
        raise ValueError(
            f"The observation lies at {ratios.tolist()} between the two rules; 0 to 1 is flanked; use closest rules."
        )
    intermediate = (1 - ratios[:, None]) * antecedents[0] + ratios[:, None] * antecedents[1]  # (D, 4)
    ratio = ratios[differs].mean()
    return _deform((1 - ratio) * consequents[0] + ratio * consequents[1], intermediate, observation)


def interpolate_closest(
    observation: np.ndarray,
    antecedents: np.ndarray,
    consequents: np.ndarray,
    ranges: np.ndarray,
    slopes: np.ndarray,
) -> np.ndarray:
    """Interpolate, or extrapolate, from N rules with weights ``1 / (1 + distance)`` per antecedent (T-FRI).

    Where the rules are centred beside the observation, the conclusion moves along ``slopes``, so that rules on a plane
    are continued exactly. Huang and Shen shift each antecedent by itself and take the range of the consequent divided
    by D for its slope; measured slopes (``SparseRules.slopes``) are closer on five of seven kinds of random monotone
    tables. Shapes as in ``interpolate_flanking``; the conclusion can leave the hull of the consequents.
    """
    observed = representative(observation)
    distances = np.abs(representative(antecedents) - observed) / ranges  # (N, D)
    weights = 1 / (1 + distances)
    weights = weights / weights.sum(axis=0)
    intermediate = np.einsum("nd,ndp->dp", weights, antecedents)
    shares = weights.mean(axis=1)  # (N,)
    # the weighted rules lie beside the observation by this much, of each universe
    beside = (observed - shares @ representative(antecedents)) / ranges
    return _deform(shares @ consequents + slopes @ beside, intermediate, observation)


def interpolate_cuts(
    observation: np.ndarray,
    antecedents: np.ndarray,
    consequents: np.ndarray,
    ranges: np.ndarray,
    power: float = 1.0,
) -> np.ndarray:
    """Interpolate both ends of every alpha-cut by themselves, with weights ``distance ** -power`` (Koczy-Hirota).

    For trapezoids only the cuts at 0 and 1 are computed and the sides are taken to be straight, as usual. The power is
    1 in the original method, which takes two flanking rules; in the stabilised one it is the number of antecedents.
    Shapes as in ``interpolate_flanking``.

    Raises:
        ValueError: If ends cross, so that the conclusion is no fuzzy set.
    """
    distances = np.linalg.norm((antecedents - observation) / ranges[:, None], axis=1)  # (N, 4)
    ends = [_weighted_mean(distances[:, end], consequents[:, end], power) for end in range(4)]
    return _in_order(np.array(ends), "Koczy-Hirota", 1e-9)


def _select(
    rules: SparseRules, observation: np.ndarray, options: InterpolationOptions
) -> tuple[list[tuple[np.ndarray, np.ndarray]], bool]:
    """Give the rules to average over, antecedents (N, D, 4) and consequents (N, 4), and whether they flank in pairs."""
    pairs = rules.flanking_pairs(observation) if options.selection == "flanking" else []
    groups = pairs or [rules.closest(observation, options.num_closest)]
    return [(rules.antecedents[rows], rules.consequents[rows]) for rows in groups], bool(pairs)


def _by_scale_and_move(rules: SparseRules, observation: np.ndarray, options: InterpolationOptions) -> np.ndarray:
    groups, are_flanking = _select(rules, observation, options)
    if are_flanking:
        return np.mean([interpolate_flanking(observation, *pair) for pair in groups], axis=0)
    return interpolate_closest(observation, *groups[0], rules.ranges, rules.slopes)


def _by_koczy_hirota(rules: SparseRules, observation: np.ndarray, options: InterpolationOptions) -> np.ndarray:
    groups, _ = _select(rules, observation, options)
    return np.mean([interpolate_cuts(observation, *group, rules.ranges) for group in groups], axis=0)


def _by_stabilised_koczy_hirota(rules: SparseRules, observation: np.ndarray, _: InterpolationOptions) -> np.ndarray:
    power = len(rules.ranges)
    return interpolate_cuts(observation, rules.antecedents, rules.consequents, rules.ranges, power)


def _by_main_effects(rules: SparseRules, observation: np.ndarray, options: InterpolationOptions) -> np.ndarray:
    """Fit one effect per term by least squares, of equal fits the one with the smallest numbers; end by end."""
    columns, row = [np.ones((len(rules.antecedents), 1))], [np.ones(1)]
    for axis, observed in enumerate(observation):
        terms, numbers = np.unique(rules.antecedents[:, axis], axis=0, return_inverse=True)
        is_observed = (terms == observed).all(axis=1)
        if not is_observed.any():
            raise ValueError(
                "Method 'additive' needs a rule for every term, but some term of an antecedent has none; add rules or "
                "use 'scale_and_move'."
            )
        columns.append(np.eye(len(terms))[numbers.ravel()])
        row.append(is_observed.astype(np.float64))
    # the published rules pair medium with medium, so two effects are not distinguished: least norm shares them evenly
    effects = np.linalg.lstsq(np.hstack(columns), rules.consequents, rcond=None)[0]
    return _in_order(np.concatenate(row) @ effects, "additive", 1e-9 * (1 + np.abs(rules.consequents).max()))


def _by_nearest_two(rules: SparseRules, observation: np.ndarray, options: InterpolationOptions) -> np.ndarray:
    """Weigh the two nearest rules by inverse distance, as published; ties keep the order of the rules."""
    rows = rules.closest(observation, 2)
    return _weighted_mean(np.linalg.norm(rules.steps_from(observation)[rows], axis=1), rules.consequents[rows])


METHODS: dict[str, Callable[[SparseRules, np.ndarray, InterpolationOptions], np.ndarray]] = {
    "scale_and_move": _by_scale_and_move,
    "koczy_hirota": _by_koczy_hirota,
    "koczy_hirota_stabilised": _by_stabilised_koczy_hirota,
    "additive": _by_main_effects,
    "nearest_two": _by_nearest_two,
}
"""Methods by name, each from rules and one observation (D, 4) to a conclusion (4,)."""


def _deform(conclusion: np.ndarray, intermediate: np.ndarray, observation: np.ndarray) -> np.ndarray:
    """Deform a conclusion, (4,), as the intermediate sets deform into the observed ones, (D, 4), on average."""
    parts = [transformation_between(*pair) for pair in zip(intermediate, observation, strict=True)]
    return transform(conclusion, Transformation(*np.mean(parts, axis=0).tolist()))


def _weighted_mean(distances: np.ndarray, values: np.ndarray, power: float = 1.0) -> np.ndarray:
    """Average over the first axis with inverse distances, (n,); rules at distance zero decide alone."""
    if (distances == 0).any():
        return values[distances == 0].mean(axis=0)
    weights = (distances / distances.min()) ** -power
    return weights @ values / weights.sum()


def _in_order(conclusion: np.ndarray, method: str, tolerance: float) -> np.ndarray:
    """Give a conclusion back, or refuse it if its ends cross."""
    if not is_valid(conclusion, tolerance):
        raise ValueError(
            f"The {method} conclusion {conclusion.round(4).tolist()} is no fuzzy set: its points must not decrease; "
            "use method 'scale_and_move'."
        )
    return conclusion


# Fuzzy sets, and the scale and move transformations between them.


def fuzzy_set(points: Shape) -> np.ndarray:
    """Make a set, (4,), from a singleton (1 number), a triangle (3) or a trapezoid (4).

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


class Transformation(NamedTuple):
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
    """Find the transformation of ``source`` into ``target``, (4,) each; the identity for a source without support.

    Only the shapes count where the representative values differ.
    """
    support, target_support = source[3] - source[0], target[3] - target[0]
    if support <= 0:
        return Transformation()
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
