"""Monotone completion of a rule table: given cells stay, the others move as little as possible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from fuzzyroe.rules.quadratic_program import solve_quadratic_program


def order_edges(shape: Sequence[int], signs: Sequence[int]) -> np.ndarray:
    """List the pairs of neighbouring cells whose consequents must not decrease.

    Args:
        shape: Terms per antecedent, (K,) entries.
        signs: Direction per antecedent: 1, -1, or 0 for no demand.

    Returns:
        Flat cell indices (lower, upper), (E, 2), in row-major order of the table.
    """
    cells = np.arange(np.prod(shape)).reshape(shape)
    edges = [np.empty((0, 2), dtype=np.int64)]
    for axis, sign in enumerate(signs):
        before = np.take(cells, range(shape[axis] - 1), axis=axis).ravel()
        after = np.take(cells, range(1, shape[axis]), axis=axis).ravel()
        if sign:
            edges.append(np.stack([before, after][::sign], axis=1))
    return np.concatenate(edges)


def order_constraints(edges: np.ndarray, num_cells: int) -> np.ndarray:
    """Write the edges as rows G of ``G c >= 0``.

    Args:
        edges: Pairs (lower, upper), (E, 2).
        num_cells: Number of cells R.

    Returns:
        Matrix, (E, R).
    """
    matrix = np.zeros((len(edges), num_cells))
    rows = np.arange(len(edges))
    matrix[rows, edges[:, 0]] = -1.0
    matrix[rows, edges[:, 1]] = 1.0
    return matrix


def find_contradictions(
    table: np.ndarray, signs: np.ndarray, tolerance: float
) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """List the pairs of given cells, neighbours or not, that are in the wrong order.

    Args:
        table: Table, nan where there is no rule, (K_1, ..., K_D).
        signs: Direction per antecedent: 1, -1, or 0 for no demand, (D,).
        tolerance: Largest excess that counts as rounding.

    Returns:
        The cell that should not be larger, the cell that should not be smaller, and the excess.
    """
    given = [tuple(cell) for cell in np.argwhere(~np.isnan(table)).tolist()]
    found = []
    for first, second in itertools.permutations(given, 2):
        excess = float(table[first] - table[second])
        steps = np.subtract(second, first) if excess > tolerance else None
        if steps is not None and (steps[signs == 0] == 0).all() and (steps * signs >= 0).all():
            found.append((first, second, excess))
    return found


def project_missing(table: np.ndarray, given: np.ndarray, signs: Sequence[int]) -> np.ndarray:
    """Move the cells that were not given to the closest monotone values, in the sense of least squares.

    Args:
        table: Complete table, (K_1, ..., K_D).
        given: Which cells must stay, bool, same shape.
        signs: Direction per antecedent: 1, -1, or 0 for no demand.

    Returns:
        A table of the same shape. It is monotone if the given cells are; where two given cells contradict each other,
        the cells between them take the middle.
    """
    projected = table.copy()
    if given.all() or not any(signs):
        return projected
    lower, upper = _bounds_from_given(table, given, signs)
    free = np.flatnonzero(~given)
    # cells held from both sides leave the program: without room inside it, rounding would look like a contradiction
    is_held = upper - lower <= 1e-12 * (1 + np.abs(table).max())
    projected.ravel()[free[is_held]] = (lower[is_held] + upper[is_held]) / 2
    free, lower, upper = free[~is_held], lower[~is_held], upper[~is_held]
    if free.size == 0:
        return projected
    position = np.full(table.size, -1)
    position[free] = np.arange(free.size)
    edges = position[order_edges(table.shape, signs)]
    edges = edges[(edges >= 0).all(axis=1)]
    eye = np.eye(free.size)
    has_lower, has_upper = np.isfinite(lower), np.isfinite(upper)
    constraints = np.vstack([order_constraints(edges, free.size), eye[has_lower], -eye[has_upper]])
    bounds = np.concatenate([np.zeros(len(edges)), lower[has_lower], -upper[has_upper]])
    solution = solve_quadratic_program(eye, table.ravel()[free], constraints, bounds)
    projected.ravel()[free] = np.clip(solution, lower, upper)
    return projected


def make_monotone_exactly(table: np.ndarray, signs: Sequence[int]) -> np.ndarray:
    """Remove violations of rounding size by a running maximum along every axis with a direction.

    Args:
        table: Table that is monotone up to rounding, (K_1, ..., K_D).
        signs: Direction per antecedent: 1, -1, or 0.

    Returns:
        A table without any violation, same shape.
    """
    for axis, sign in enumerate(signs):
        if sign:
            upwards = table if sign > 0 else np.flip(table, axis)
            upwards = np.maximum.accumulate(upwards, axis)
            table = upwards if sign > 0 else np.flip(upwards, axis)
    return table


def _bounds_from_given(table: np.ndarray, given: np.ndarray, signs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Bound each free cell by the given cells below it and above it, (F,) each, infinite where there is none.

    Given cells that contradict each other, be it by rounding, bound with the middle of the largest value below and the
    smallest above: both grow with the order, so the bounds leave room for a monotone table whatever was given.
    """
    cells = np.array(list(itertools.product(*map(range, table.shape))))
    signs = np.asarray(signs)
    ordered, fixed = cells * signs, cells[:, signs == 0]
    known = np.flatnonzero(given)
    same = (fixed[:, None] == fixed[known][None]).all(axis=-1)  # cells compare only at equal undirected terms
    below = same & (ordered[known][None] <= ordered[:, None]).all(axis=-1)  # (cells, known)
    above = same & (ordered[known][None] >= ordered[:, None]).all(axis=-1)

    def bound(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lower = np.where(below, values, -np.inf).max(axis=1, initial=-np.inf)
        return lower, np.where(above, values, np.inf).min(axis=1, initial=np.inf)

    lower, upper = bound(table.ravel()[known])
    lower, upper = bound((lower[known] + upper[known]) / 2)
    free = np.flatnonzero(~given)
    return lower[free], upper[free]
