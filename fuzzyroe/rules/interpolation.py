"""Completion of a sparse rule table: every cell without a rule gets the consequent its neighbours suggest.

This runs when a rule base is built, never in a forward pass. The missing cell's terms are the observation; consequents
are singletons, so only the position of a conclusion is kept (its representative value).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fuzzyroe.rules import koczy_hirota, scale_and_move
from fuzzyroe.rules.fuzzy_set import representative
from fuzzyroe.rules.isotonic import project_missing

_CLOSEST = re.compile(r"closest_([1-9][0-9]*)")


@dataclass(frozen=True)
class InterpolationOptions:
    """How missing cells are concluded.

    Attributes:
        method: A key of ``METHODS``.
        selection: Rules to use: ``"flanking"`` (the pairs on both sides along one antecedent) or ``"closest_N"``.
        fallback: ``"closest_N"`` for cells that no pair flanks.
        monotone: Whether the result is projected onto the declared directions, with the given cells held.
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


@dataclass(frozen=True)
class SparseTable:
    """A rule table with holes, with what its axes mean.

    Attributes:
        table: Consequents in units of their universe, nan where there is no rule, (K_1, ..., K_D).
        term_sets: Terms of each antecedent as fuzzy sets, D arrays of (K_j, 4).
        ranges: Widths of the universes of the antecedents, (D,).
        signs: Directions of their effects: 1, -1, or 0 (unknown), (D,).
        consequent_range: Width of the universe of the consequent.
    """

    table: np.ndarray
    term_sets: tuple[np.ndarray, ...]
    ranges: np.ndarray
    signs: np.ndarray
    consequent_range: float

    def __post_init__(self) -> None:
        if np.isnan(self.table).all():
            raise ValueError("The table has no rule at all; at least one is needed; add rules.")

    def sets_of(self, cells: np.ndarray) -> np.ndarray:
        """Give the antecedent sets of cells (N, D) as (N, D, 4)."""
        return np.stack([sets[cells[:, axis]] for axis, sets in enumerate(self.term_sets)], axis=1)

    def values_of(self, cells: np.ndarray) -> np.ndarray:
        """Give the consequents of cells (N, D) as (N,)."""
        return self.table[tuple(cells.T)]

    def positions_of(self, cells: np.ndarray) -> np.ndarray:
        """Give the representative values of cells (N, D), in units of the universes, as (N, D)."""
        return representative(self.sets_of(cells)) / self.ranges


def complete_table(sparse: SparseTable, options: InterpolationOptions) -> np.ndarray:
    """Conclude every missing cell from the given ones.

    Args:
        sparse: The table and its axes.
        options: Method, selection of rules, projection.

    Returns:
        The complete table; given cells keep every bit. Conclusions are clipped to the hull of the given consequents.

    Raises:
        ValueError: If the method cannot conclude some cell, saying which and what to use instead.
    """
    missing, given = np.argwhere(np.isnan(sparse.table)), np.argwhere(~np.isnan(sparse.table))
    completed = sparse.table.copy()
    if not len(missing):
        return completed
    conclusions = METHODS[options.method](sparse, given, missing, options)
    hull = np.nanmin(sparse.table), np.nanmax(sparse.table)
    completed[tuple(missing.T)] = np.clip(conclusions, *hull)
    return project_missing(completed, ~np.isnan(sparse.table), sparse.signs) if options.monotone else completed


def _flanking_pairs(
    given: np.ndarray, cell: np.ndarray, positions: np.ndarray, position: np.ndarray
) -> list[np.ndarray]:
    """Find the given cells next to ``cell`` on both sides along one antecedent, all others equal.

    Args:
        given: Cells with a rule, (N, D).
        cell: The missing cell, (D,).
        positions: Representative values of the given cells, (N, D).
        position: Representative values of the missing cell, (D,).

    Returns:
        Row numbers into ``given``, (2,) each: the narrowest pair, or all of them when several are equally narrow.
    """
    pairs, widths = [], []
    for axis in range(len(cell)):
        line = np.flatnonzero((np.delete(given, axis, 1) == np.delete(cell, axis)).all(axis=1))
        below = line[given[line, axis] < cell[axis]]
        above = line[given[line, axis] > cell[axis]]
        if below.size and above.size:
            pair = np.array([below[np.argmax(given[below, axis])], above[np.argmin(given[above, axis])]])
            pairs.append(pair)
            widths.append(np.ptp(positions[pair, axis]))
    return [pair for pair, width in zip(pairs, widths, strict=True) if np.isclose(width, min(widths))]


def _closest(positions: np.ndarray, position: np.ndarray, count: int) -> np.ndarray:
    """Give the row numbers of the ``count`` closest positions; ties keep the order of the rules."""
    distances = np.linalg.norm(positions - position, axis=1).round(12)
    return np.argsort(distances, kind="stable")[:count]


def _interpolate_locally(
    sparse: SparseTable,
    given: np.ndarray,
    missing: np.ndarray,
    options: InterpolationOptions,
    from_pair: Callable[..., np.ndarray],
    from_closest: Callable[..., np.ndarray],
) -> np.ndarray:
    """Conclude each cell from its flanking pairs, else from the closest rules; (M,)."""
    positions, sets = sparse.positions_of(given), sparse.sets_of(given)
    singletons = np.repeat(sparse.values_of(given)[:, None], 4, axis=1)  # (N, 4)
    conclusions = []
    for cell, position, observation in zip(missing, sparse.positions_of(missing), sparse.sets_of(missing), strict=True):
        pairs = _flanking_pairs(given, cell, positions, position) if options.selection == "flanking" else []
        try:
            if pairs:
                values = [representative(from_pair(observation, sets[pair], singletons[pair])) for pair in pairs]
            else:
                rows = _closest(positions, position, options.num_closest())
                values = [representative(from_closest(observation, sets[rows], singletons[rows]))]
        except ValueError as error:
            raise ValueError(f"Cell {tuple(cell.tolist())}: {error}") from error
        conclusions.append(np.mean(values))
    return np.array(conclusions)


def _by_scale_and_move(
    sparse: SparseTable, given: np.ndarray, missing: np.ndarray, options: InterpolationOptions
) -> np.ndarray:
    def from_closest(observation: np.ndarray, sets: np.ndarray, consequents: np.ndarray) -> np.ndarray:
        return scale_and_move.interpolate_closest(
            observation, sets, consequents, sparse.ranges, sparse.consequent_range, sparse.signs
        )

    return _interpolate_locally(sparse, given, missing, options, scale_and_move.interpolate_flanking, from_closest)


def _by_koczy_hirota(
    sparse: SparseTable, given: np.ndarray, missing: np.ndarray, options: InterpolationOptions
) -> np.ndarray:
    def conclude(observation: np.ndarray, sets: np.ndarray, consequents: np.ndarray) -> np.ndarray:
        return koczy_hirota.conclude(observation, sets, consequents, sparse.ranges)

    return _interpolate_locally(sparse, given, missing, options, conclude, conclude)


def _by_stabilised_koczy_hirota(
    sparse: SparseTable, given: np.ndarray, missing: np.ndarray, options: InterpolationOptions
) -> np.ndarray:
    sets, singletons = sparse.sets_of(given), np.repeat(sparse.values_of(given)[:, None], 4, axis=1)
    power = len(sparse.ranges)
    return np.array(
        [
            representative(koczy_hirota.conclude(observation, sets, singletons, sparse.ranges, power))
            for observation in sparse.sets_of(missing)
        ]
    )


def _by_main_effects(
    sparse: SparseTable, given: np.ndarray, missing: np.ndarray, options: InterpolationOptions
) -> np.ndarray:
    """Fit one number per term by least squares, of equal fits the one with the smallest numbers."""

    def design(cells: np.ndarray) -> np.ndarray:
        columns = [np.eye(size)[cells[:, axis]] for axis, size in enumerate(sparse.table.shape)]
        return np.hstack([np.ones((len(cells), 1)), *columns])

    matrix = design(given)
    if not matrix.any(axis=0).all():
        raise ValueError(
            "Method 'additive' needs a rule for every term, but some term of an antecedent has none; add rules or use "
            "'scale_and_move'."
        )
    # the published rules pair medium with medium, so two effects cannot be told apart: least norm shares them evenly
    return design(missing) @ np.linalg.lstsq(matrix, sparse.values_of(given), rcond=None)[0]


def _by_nearest_two(
    sparse: SparseTable, given: np.ndarray, missing: np.ndarray, options: InterpolationOptions
) -> np.ndarray:
    """Weigh the two nearest rules by inverse distance, as published; ties keep the order of the rules."""
    positions, values = sparse.positions_of(given), sparse.values_of(given)
    conclusions = []
    for position in sparse.positions_of(missing):
        rows = _closest(positions, position, 2)
        weights = 1 / np.linalg.norm(positions[rows] - position, axis=1)
        conclusions.append(weights @ values[rows] / weights.sum())
    return np.array(conclusions)


METHODS: dict[str, Callable[[SparseTable, np.ndarray, np.ndarray, InterpolationOptions], np.ndarray]] = {
    "scale_and_move": _by_scale_and_move,
    "koczy_hirota": _by_koczy_hirota,
    "koczy_hirota_stabilised": _by_stabilised_koczy_hirota,
    "additive": _by_main_effects,
    "nearest_two": _by_nearest_two,
}


@dataclass(frozen=True)
class Disagreement:
    """A missing cell on which methods differ.

    Attributes:
        terms: Terms of the cell, in the order of the antecedents.
        values: Conclusion of each method, in units of the consequent's universe.
        spread: Largest minus smallest conclusion, as a share of that universe.
    """

    terms: tuple[str, ...]
    values: dict[str, float]
    spread: float


def find_disagreements(
    sparse: SparseTable, terms: Sequence[Sequence[str]], methods: Sequence[str], tolerance: float
) -> tuple[Disagreement, ...]:
    """List the missing cells on which completion methods differ by more than a tolerance.

    Args:
        sparse: The table and its axes.
        terms: Names of the terms of each antecedent.
        methods: Two or more keys of ``METHODS``; each with its default selection.
        tolerance: Allowed spread, as a share of the consequent's universe.

    Returns:
        The cells beyond the tolerance, the largest spread first.
    """
    tables = {method: complete_table(sparse, InterpolationOptions(method)) for method in methods}
    found = []
    for cell in map(tuple, np.argwhere(np.isnan(sparse.table))):
        values = {method: float(table[cell]) for method, table in tables.items()}
        spread = (max(values.values()) - min(values.values())) / sparse.consequent_range
        if spread > tolerance:
            found.append(Disagreement(tuple(terms[axis][k] for axis, k in enumerate(cell)), values, spread))
    return tuple(sorted(found, key=lambda item: -item.spread))
