"""Fuzzy rule interpolation: what sparse rules conclude from an observation that fires none of them.

Sets may be singletons, triangles or trapezoids on both sides. This runs when a rule base is built, never in a forward
pass; there consequents are singletons, of which only the position counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fuzzyroe.rules import koczy_hirota, scale_and_move
from fuzzyroe.rules.fuzzy_set import fuzzy_set, is_valid
from fuzzyroe.rules.sparse_rules import Shape, SparseRules

_CLOSEST = re.compile(r"closest_([1-9][0-9]*)")


@dataclass(frozen=True)
class InterpolationOptions:
    """How an observation without a rule is concluded.

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
        if self.selection != "flanking" and not _CLOSEST.fullmatch(self.selection):
            raise ValueError(
                f"selection is {self.selection!r}; 'flanking' or 'closest_N' is allowed; write for instance "
                "'closest_3'."
            )
        if not _CLOSEST.fullmatch(self.fallback):
            raise ValueError(f"fallback is {self.fallback!r}; 'closest_N' is allowed; write for instance 'closest_3'.")

    def num_closest(self) -> int:
        """Give N of the ``closest_N`` in use."""
        name = self.fallback if self.selection == "flanking" else self.selection
        return int(_CLOSEST.fullmatch(name).group(1))


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

    ``conclude([([(0, 5, 6)], (0, 2, 4)), ([(11, 13, 14)], (10, 11, 13))], [(7, 8, 9)])`` is about (5.84, 6.26, 6.26,
    7.38).

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
        ValueError: If a shape is no fuzzy set, or the method cannot conclude, saying why and what to use instead.
    """
    sparse = SparseRules.from_shapes(rules, ranges, signs)
    observed = np.array([fuzzy_set(shape) for shape in observation])
    if observed.shape != sparse.antecedents.shape[1:]:
        raise ValueError(
            f"The observation has {len(observed)} sets; {sparse.antecedents.shape[1]} are allowed, one per antecedent "
            "of the rules; add or remove some."
        )
    return interpolate(sparse, observed[None], InterpolationOptions(method, **options))[0]


def interpolate(rules: SparseRules, observations: np.ndarray, options: InterpolationOptions) -> np.ndarray:
    """Conclude from several observations.

    Args:
        rules: One or more rules.
        observations: Observed sets, (M, D, 4); one that equals the antecedents of a rule gets its consequent.
        options: Method and selection of rules.

    Returns:
        Conclusions, (M, 4).

    Raises:
        ValueError: If the method cannot conclude from some observation.
    """
    conclusions = []
    for observation in observations:
        own = np.flatnonzero((rules.antecedents == observation).all(axis=(1, 2)))
        if own.size:
            conclusions.append(rules.consequents[own].mean(axis=0))
        else:
            conclusions.append(METHODS[options.method](rules, observation, options))
    return np.reshape(conclusions, (len(observations), 4))


def _interpolate_locally(
    rules: SparseRules,
    observation: np.ndarray,
    options: InterpolationOptions,
    from_pair: Callable[..., np.ndarray],
    from_closest: Callable[..., np.ndarray],
) -> np.ndarray:
    """Conclude from the flanking pairs, of equally narrow ones in the mean, else from the closest rules."""
    pairs = rules.flanking_pairs(observation) if options.selection == "flanking" else []
    if pairs:
        return np.mean([from_pair(observation, rules.antecedents[p], rules.consequents[p]) for p in pairs], axis=0)
    rows = rules.closest(observation, options.num_closest())
    return from_closest(observation, rules.antecedents[rows], rules.consequents[rows])


def _by_scale_and_move(rules: SparseRules, observation: np.ndarray, options: InterpolationOptions) -> np.ndarray:
    def from_closest(observation: np.ndarray, sets: np.ndarray, consequents: np.ndarray) -> np.ndarray:
        return scale_and_move.interpolate_closest(observation, sets, consequents, rules.ranges, rules.slopes)

    return _interpolate_locally(rules, observation, options, scale_and_move.interpolate_flanking, from_closest)


def _by_koczy_hirota(rules: SparseRules, observation: np.ndarray, options: InterpolationOptions) -> np.ndarray:
    def conclude(observation: np.ndarray, sets: np.ndarray, consequents: np.ndarray) -> np.ndarray:
        return koczy_hirota.conclude(observation, sets, consequents, rules.ranges)

    return _interpolate_locally(rules, observation, options, conclude, conclude)


def _by_stabilised_koczy_hirota(
    rules: SparseRules, observation: np.ndarray, options: InterpolationOptions
) -> np.ndarray:
    power = len(rules.ranges)
    return koczy_hirota.conclude(observation, rules.antecedents, rules.consequents, rules.ranges, power)


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
    # the published rules pair medium with medium, so two effects cannot be told apart: least norm shares them evenly
    effects = np.linalg.lstsq(np.hstack(columns), rules.consequents, rcond=None)[0]
    conclusion = np.concatenate(row) @ effects
    if not is_valid(conclusion, 1e-9 * (1 + np.abs(rules.consequents).max())):
        raise ValueError(
            f"The additive conclusion {conclusion.round(4).tolist()} is no fuzzy set: its points must not decrease; "
            "use method 'scale_and_move'."
        )
    return conclusion


def _by_nearest_two(rules: SparseRules, observation: np.ndarray, options: InterpolationOptions) -> np.ndarray:
    """Weigh the two nearest rules by inverse distance, as published; ties keep the order of the rules."""
    rows = rules.closest(observation, 2)
    distances = np.linalg.norm(rules.positions[rows] - rules.positions_of(observation), axis=1)
    if not distances.all():
        return rules.consequents[rows[distances == 0]].mean(axis=0)
    weights = 1 / distances
    return weights @ rules.consequents[rows] / weights.sum()


METHODS: dict[str, Callable[[SparseRules, np.ndarray, InterpolationOptions], np.ndarray]] = {
    "scale_and_move": _by_scale_and_move,
    "koczy_hirota": _by_koczy_hirota,
    "koczy_hirota_stabilised": _by_stabilised_koczy_hirota,
    "additive": _by_main_effects,
    "nearest_two": _by_nearest_two,
}
"""Methods by name, each from rules and one observation (D, 4) to a conclusion (4,)."""
