"""Strictly convex quadratic programs with inequality constraints, solved exactly as a least-distance problem.

``minimise (c - m)' H (c - m)  subject to  G c >= h`` becomes, with ``H = L L'`` and ``z = L' (c - m)``, the search for
the shortest ``z`` in a polyhedron, which one non-negative least squares solve answers.

Reference:
    Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23 (problem LDP).
"""

from __future__ import annotations

import numpy as np

ROUNDING = 1e-12


def solve_quadratic_program(
    hessian: np.ndarray, minimum: np.ndarray, constraints: np.ndarray, bounds: np.ndarray
) -> np.ndarray:
    """Find the feasible point closest to the free minimum in the metric of the hessian.

    Args:
        hessian: Symmetric positive definite matrix H, (R, R).
        minimum: Minimum m without constraints, (R,); it is returned bit for bit when feasible up to rounding.
        constraints: Matrix G, (M, R).
        bounds: Right-hand sides h, (M,).

    Returns:
        The solution, (R,), feasible up to rounding.

    Raises:
        ValueError: If no point satisfies the constraints.
    """
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
    if np.linalg.norm(residual) < 1e-9 or residual[-1] > -1e-14:
        raise ValueError(
            "The constraints contradict each other, so no table fulfils them; a monotone table within the allowed "
            "change is needed; raise max_change, or give up monotone."
        )
    shortest = -residual[:-1] / residual[-1] * size
    return minimum + solve_triangular(factor.T, shortest, lower=False)


def _solve_nonnegative(system: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Find the ``x >= 0`` that minimises ``|system x - goal|``, (M,).

    scipy's ``nnls`` stops early on about one in 500 tables with ties; at a minimum no coordinate is worth raising.
    """
    from scipy.optimize import lsq_linear, nnls

    solution, _ = nnls(system, goal, maxiter=30 * system.shape[1])
    if (system.T @ (system @ solution - goal)).min() < -1e-9:
        solution = lsq_linear(system, goal, (0, np.inf), method="bvls", tol=1e-15, max_iter=30 * system.shape[1]).x
    return solution
