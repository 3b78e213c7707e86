"""Completion of a sparse rule table: every cell without a rule gets the consequent its neighbours suggest.

This runs when a rule base is built, never in a forward pass. The missing cell's terms are the observation; consequents
are singletons, so only the position of a conclusion is kept (its representative value).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fuzzyroe.rules.fuzzy_set import representative
from fuzzyroe.rules.interpolation import InterpolationOptions, interpolate
from fuzzyroe.rules.isotonic import project_missing
from fuzzyroe.rules.sparse_rules import SparseRules


@dataclass(frozen=True, eq=False)
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

    def rules(self) -> SparseRules:
        """Give the cells with a rule, in row-major order."""
        given = np.argwhere(~np.isnan(self.table))
        singletons = np.repeat(self.table[tuple(given.T)][:, None], 4, axis=1)  # (N, 4)
        return SparseRules(self.sets_of(given), singletons, self.ranges, self.signs)


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
    is_given = ~np.isnan(sparse.table)
    completed, rules, missing = sparse.table.copy(), sparse.rules(), np.argwhere(~is_given)
    for cell, observation in zip(map(tuple, missing.tolist()), sparse.sets_of(missing), strict=True):
        try:
            completed[cell] = representative(interpolate(rules, observation[None], options)[0])
        except ValueError as error:
            raise ValueError(f"Cell {cell}: {error}") from error
    hull = np.nanmin(sparse.table), np.nanmax(sparse.table)
    completed = completed.clip(*hull)
    # clipped again: projection rounds, and a consequent just outside its universe would be refused
    return project_missing(completed, is_given, sparse.signs).clip(*hull) if options.monotone else completed


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
        methods: Two or more keys of ``interpolation.METHODS``; each with its default selection.
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
