"""Monotone rule tables: the order that declared directions demand, and the closest table that respects it.

``minimise (c - m)' H (c - m)  subject to  G c >= h`` is a strictly convex quadratic program. With ``H = L L'`` and
``z = L' (c - m)`` it becomes the search for the shortest ``z`` in a polyhedron, which one non-negative least squares
solve answers exactly. Isotonic regression of a table is the case ``H = I``.

Reference:
    Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23 (problem LDP).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDING = 1e-12

Cell = tuple[int, ...]
Contradiction = tuple[Cell, Cell, float]
"""The cell that should not be larger, the cell that should not be smaller, and the excess."""


def order_edges(shape: Sequence[int], signs: Sequence[int] | np.ndarray) -> np.ndarray:
    """List the pairs of neighbouring cells whose consequents must not decrease.

    Args:
        shape: Terms per antecedent, D entries.
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
    """Write edges (lower, upper), (E, 2), as rows G of ``G c >= 0``, (E, R)."""
    matrix = np.zeros((len(edges), num_cells))
    rows = np.arange(len(edges))
    matrix[rows, edges[:, 0]] = -1.0
    matrix[rows, edges[:, 1]] = 1.0
    return matrix


def find_contradictions(table: np.ndarray, signs: Sequence[int] | np.ndarray, tolerance: float) -> list[Contradiction]:
    """List the pairs of given cells, neighbours or not, that are in the wrong order.

    Args:
        table: Table, nan where there is no rule, (K_1, ..., K_D).
        signs: Direction per antecedent: 1, -1, or 0 for no demand, (D,).
        tolerance: Largest excess that counts as rounding.
    """
    given = np.argwhere(~np.isnan(table))
    values = table[tuple(given.T)]
    excess = values[:, None] - values[None]
    pairs = np.argwhere(_precedes(given, given, signs) & (excess > tolerance))
    return [(tuple(given[i].tolist()), tuple(given[j].tolist()), float(excess[i, j])) for i, j in pairs]


def project_missing(table: np.ndarray, given: np.ndarray, signs: Sequence[int] | np.ndarray) -> np.ndarray:
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
    is_held = upper - lower <= ROUNDING * (1 + np.abs(table).max())
    projected.ravel()[free[is_held]] = (lower[is_held] + upper[is_held]) / 2
    free, lower, upper = free[~is_held], lower[~is_held], upper[~is_held]
    if free.size == 0:
        return projected
    order = order_constraints(order_edges(table.shape, signs), table.size)[:, free]
    order = order[np.abs(order).sum(axis=1) == 2]  # an edge to a given cell is a bound already
    eye = np.eye(free.size)
    bounds = np.concatenate([np.zeros(len(order)), lower, -upper])
    solution = solve_quadratic_program(eye, table.ravel()[free], np.vstack([order, eye, -eye]), bounds)
    projected.ravel()[free] = np.clip(solution, lower, upper)
    return projected


def make_monotone_exactly(table: np.ndarray, signs: Sequence[int] | np.ndarray) -> np.ndarray:
    """Remove violations of rounding size by a running maximum along every axis with a direction.

    Args:
        table: Table that is monotone up to rounding, (K_1, ..., K_D).
        signs: Direction per antecedent: 1, -1, or 0.

    Returns:
        A table without any violation, same shape.
    """
    downwards = tuple(axis for axis, sign in enumerate(signs) if sign < 0)
    upwards = np.flip(table, downwards)
    for axis in np.flatnonzero(signs):
        upwards = np.maximum.accumulate(upwards, int(axis))
    return np.flip(upwards, downwards)


def solve_quadratic_program(
    hessian: np.ndarray, minimum: np.ndarray, constraints: np.ndarray, bounds: np.ndarray
) -> np.ndarray:
    """Find the feasible point closest to the free minimum in the metric of the hessian.

    Args:
        hessian: Symmetric positive definite matrix H, (R, R).
        minimum: Minimum m without constraints, (R,); it is returned bit for bit when feasible up to rounding.
        constraints: Matrix G, (M, R).
        bounds: Right-hand sides h, (M,); an infinite one demands nothing.

    Returns:
        The solution, (R,), feasible up to rounding.

    Raises:
        ValueError: If no point satisfies the constraints.
    """
    constraints, bounds = constraints[np.isfinite(bounds)], bounds[np.isfinite(bounds)]
    gaps = bounds - constraints @ minimum
    # gaps of rounding size are no contradiction to work on: scaled up below, they would look like one
    if gaps.size == 0 or gaps.max() <= ROUNDING * max(np.abs(minimum).max(), np.abs(bounds).max()):
        return minimum.copy()
    from scipy.linalg import solve_triangular

    factor = np.linalg.cholesky(hessian)
    # rows of G L^-T; lengths are normalised because constraints on heavily weighted coordinates become very short
    rows = solve_triangular(factor, constraints.T, lower=True).T
    lengths = np.linalg.norm(rows, axis=1)
    rows, gaps = rows / lengths[:, None], gaps / lengths
    size = gaps.max()  # |z| scales with the gaps: work near 1
    system = np.vstack([rows.T, gaps[None] / size])
    goal = np.zeros(len(system))
    goal[-1] = 1.0
    residual = system @ _solve_nonnegative(system, goal) - goal
    # no residual means that the gaps are a combination of the constraints: nothing fulfils them all
    if np.linalg.norm(residual) < 1e-9 or residual[-1] > -1e-14:
        raise ValueError(
            "The constraints contradict each other, so no table fulfils them; a monotone table within the allowed "
            "change is needed; raise max_change, or give up monotone."
        )
    shortest = -residual[:-1] / residual[-1] * size
    return minimum + solve_triangular(factor.T, shortest, lower=False)


def _solve_nonnegative(system: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Find the ``x >= 0`` that minimises ``|system x - goal|``, (M,)."""
    from scipy.optimize import lsq_linear, nnls

    solution, _ = nnls(system, goal, maxiter=30 * system.shape[1])
    # scipy's nnls stops early on about one in 500 tables with ties; at a minimum no coordinate is worth raising
    if (system.T @ (system @ solution - goal)).min() < -1e-9:
        solution = lsq_linear(system, goal, (0, np.inf), method="bvls", tol=1e-15, max_iter=30 * system.shape[1]).x
    return solution


def _precedes(cells: np.ndarray, others: np.ndarray, signs: Sequence[int] | np.ndarray) -> np.ndarray:
    """Say which cells, (n, D), must not conclude more than which others, (m, D); a bool for each pair, (n, m)."""
    steps = (others[None] - cells[:, None]) * np.asarray(signs)
    # along an antecedent without a direction only equal terms compare
    is_same = (others[None] == cells[:, None]) | (np.asarray(signs) != 0)
    return ((steps >= 0) & is_same).all(axis=-1)


def _bounds_from_given(
    table: np.ndarray, given: np.ndarray, signs: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bound each free cell by the given cells below it and above it, (F,) each, infinite where there is none.

    Given cells that contradict each other, be it by rounding, bound with the middle of the largest value below and the
    smallest above: both grow with the order, so the bounds leave room for a monotone table whatever was given.
    """
    cells, known = np.argwhere(np.ones(table.shape)), np.argwhere(given)
    below, above = _precedes(known, cells, signs).T, _precedes(cells, known, signs)  # (R, known)

    def bound(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lower = np.where(below, values, -np.inf).max(axis=1, initial=-np.inf)
        return lower, np.where(above, values, np.inf).min(axis=1, initial=np.inf)

    is_given = given.ravel()
    lower, upper = bound(table[given])
    lower, upper = bound((lower[is_given] + upper[is_given]) / 2)
    return lower[~is_given], upper[~is_given]
