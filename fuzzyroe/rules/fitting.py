"""Least squares on rule tables: consequents fitted to examples, and missing cells moved into their declared order.

Consequents are fitted to a few hundred examples, held by the expert's table as prior: ``minimise |Phi c - y|^2 +
sum_r lambda_r (c_r - c0_r)^2  subject to order, range and largest change``. Each ``lambda_r`` counts as that many
examples in favour of the prior, so a rule that no example fires keeps its value. Below some hundred examples plain
least squares is worse than not fitting at all; with the prior, fitting helps from about 25 on.

Both tasks are strictly convex quadratic programs, ``minimise (c - m)' H (c - m)  subject to  G c >= h``; isotonic
regression of a table is the case ``H = I``. With ``H = L L'`` and ``z = L' (c - m)`` a program becomes the search for
the shortest ``z`` in a polyhedron, which one non-negative least squares solve answers exactly.

Reference:
    Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23 (problem LDP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PRIOR_STRENGTHS: Mapping[str, float] = {"expert": 8.0, "interpolated": 2.0}  # in examples
ROUNDING = 1e-12

Signs = Sequence[int] | np.ndarray
"""Direction of the effect of each antecedent: 1, -1, or 0 where nothing is demanded, (D,)."""

Cell = tuple[int, ...]


@dataclass(frozen=True)
class RuleReport:
    """One rule before and after fitting, in units of the output.

    Attributes:
        terms: Terms of the rule, in the order of the antecedents.
        expert: The expert's consequent; None where the expert gave no rule.
        interpolated: The interpolated consequent; None where the expert gave one.
        fitted: The consequent in use.
        effective_examples: ``sum_i phi_ir ** 2``: as many examples that fire this rule alone would inform it as much.
        change: Fitted minus prior.
    """

    terms: tuple[str, ...]
    expert: float | None
    interpolated: float | None
    fitted: float
    effective_examples: float
    change: float


def effective_examples(firing: np.ndarray) -> np.ndarray:
    """Count the examples that inform each rule: ``sum_i phi_ir ** 2``, (R,), of firing strengths (n, R)."""
    return np.square(firing).sum(axis=0)


def fit_consequents(
    firing: np.ndarray,
    targets: np.ndarray,
    prior: np.ndarray,
    *,
    prior_strength: float | np.ndarray = PRIOR_STRENGTHS["expert"],
    edges: np.ndarray | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    max_change: float | None = None,
) -> np.ndarray:
    """Fit the consequents of zero-order rules by ridge to a prior under linear constraints.

    Args:
        firing: Firing strengths, rows sum to one, (n, R).
        targets: What the rules should give, in units of the prior; may leave [lower, upper], clipping them would bias
            the fit, (n,).
        prior: Consequents to start from, (R,).
        prior_strength: Pseudo-examples per rule, > 0, a number or (R,).
        edges: Pairs (a, b) with ``c_a <= c_b``, (E, 2); None for no order.
        lower: Smallest consequent.
        upper: Largest consequent.
        max_change: Largest allowed ``|c - prior|``; None for any.

    Returns:
        The consequents, (R,), feasible up to rounding.

    Raises:
        ValueError: If shapes do not fit, numbers are not finite, or the constraints contradict each other.
    """
    firing, targets, prior = (np.asarray(array, dtype=np.float64) for array in (firing, targets, prior))
    strengths = np.broadcast_to(np.asarray(prior_strength, dtype=np.float64), prior.shape)
    _check(firing, targets, prior, strengths)
    if max_change is not None and max_change < 0:
        raise ValueError(f"max_change is {max_change}; 0 or more is allowed; use None for no limit.")
    hessian = firing.T @ firing + np.diag(strengths)
    # solved for the change, so that rules without examples keep their prior to the last bit
    minimum = prior + np.linalg.solve(hessian, firing.T @ (targets - firing @ prior))
    change = np.inf if max_change is None else max_change
    lowest, highest = np.maximum(lower, prior - change), np.minimum(upper, prior + change)
    eye, edges = np.eye(len(prior)), np.empty((0, 2), dtype=np.int64) if edges is None else edges
    constraints = np.vstack([eye[edges[:, 1]] - eye[edges[:, 0]], eye, -eye])
    bounds = np.concatenate([np.zeros(len(edges)), lowest, -highest])
    # clipped: the program is feasible up to rounding, a consequent must be inside its range
    return np.clip(solve_quadratic_program(hessian, minimum, constraints, bounds), lowest, highest)


def _check(firing: np.ndarray, targets: np.ndarray, prior: np.ndarray, strengths: np.ndarray) -> None:
    """Refuse arrays that cannot be fitted."""
    if firing.ndim != 2 or targets.shape != firing.shape[:1] or prior.shape != firing.shape[1:] or not len(targets):
        raise ValueError(
            f"firing is {firing.shape}, targets {targets.shape}, prior {prior.shape}; (n, R), (n,), (R,) with n >= 1 "
            "are allowed; pass one target per example and one prior per rule."
        )
    for name, array in {"firing": firing, "targets": targets, "prior": prior}.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} holds {int((~np.isfinite(array)).sum())} non-finite values; finite ones are allowed; drop "
                "those examples, or interpolate the rule base first."
            )
    if not (strengths > 0).all() or not np.isfinite(strengths).all():
        raise ValueError(
            f"The smallest prior strength is {strengths.min()}; finite numbers above 0 are allowed; use a small one "
            "such as 0.01 for nearly no prior."
        )


def order_edges(shape: Sequence[int], signs: Signs) -> np.ndarray:
    """List the pairs of neighbouring cells whose consequents must not decrease, from the terms per antecedent.

    Gives flat cell indices (lower, upper), (E, 2), in row-major order of the table.
    """
    cells = np.arange(np.prod(shape)).reshape(shape)
    edges = [np.empty((0, 2), dtype=np.int64)]
    for axis, sign in enumerate(signs):
        before = np.take(cells, range(shape[axis] - 1), axis=axis).ravel()
        after = np.take(cells, range(1, shape[axis]), axis=axis).ravel()
        if sign:
            edges.append(np.stack([before, after][::sign], axis=1))
    return np.concatenate(edges)


def find_contradictions(table: np.ndarray, signs: Signs, tolerance: float) -> list[tuple[Cell, Cell, float]]:
    """List the pairs of given cells, neighbours or not, that are in the wrong order by more than a tolerance.

    Gives the cell that should not be larger, the cell that should not be smaller, and the excess, of a table with nan
    where there is no rule, (K_1, ..., K_D).
    """
    given = np.argwhere(~np.isnan(table))
    values = table[tuple(given.T)]
    excess = values[:, None] - values[None]
    pairs = np.argwhere(_precedes(given, given, signs) & (excess > tolerance))
    return [(tuple(given[i].tolist()), tuple(given[j].tolist()), float(excess[i, j])) for i, j in pairs]


def project_missing(table: np.ndarray, given: np.ndarray, signs: Signs) -> np.ndarray:
    """Move the cells that were not given to the closest monotone values, in the sense of least squares.

    Args:
        table: Complete table, (K_1, ..., K_D).
        given: Which cells must stay, bool, same shape.
        signs: Direction per antecedent.

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
    edges, eye = order_edges(table.shape, signs), np.eye(free.size)
    # an edge to a given cell is a bound already
    edges = np.searchsorted(free, edges[np.isin(edges, free).all(axis=1)])
    bounds = np.concatenate([np.zeros(len(edges)), lower, -upper])
    constraints = np.vstack([eye[edges[:, 1]] - eye[edges[:, 0]], eye, -eye])
    solution = solve_quadratic_program(eye, table.ravel()[free], constraints, bounds)
    projected.ravel()[free] = np.clip(solution, lower, upper)
    return projected


def make_monotone_exactly(table: np.ndarray, signs: Signs) -> np.ndarray:
    """Remove violations of rounding size, by a running maximum along every axis with a direction; same shape."""
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


def _precedes(cells: np.ndarray, others: np.ndarray, signs: Signs) -> np.ndarray:
    """Say which cells, (n, D), must not conclude more than which others, (m, D); a bool for each pair, (n, m)."""
    steps = (others[None] - cells[:, None]) * np.asarray(signs)
    # along an antecedent without a direction only equal terms compare
    is_same = (others[None] == cells[:, None]) | (np.asarray(signs) != 0)
    return ((steps >= 0) & is_same).all(axis=-1)


def _bounds_from_given(table: np.ndarray, given: np.ndarray, signs: Signs) -> tuple[np.ndarray, np.ndarray]:
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
