"""Fitting consequents to a few hundred examples, held by the expert's table as prior.

``minimise |Phi c - y|^2 + sum_r lambda_r (c_r - c0_r)^2  subject to order, range and largest change`` is strictly
convex. Each ``lambda_r`` counts as that many examples in favour of the prior, so a rule that no example fires keeps its
value. Below some hundred examples plain least squares is worse than not fitting at all; with the prior, fitting helps
from about 25 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fuzzyroe.rules.monotone import order_constraints, solve_quadratic_program

PRIOR_STRENGTHS: Mapping[str, float] = {"expert": 8.0, "interpolated": 2.0}  # in examples


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
    """Count the examples that inform each rule.

    Args:
        firing: Firing strengths in [0, 1], (n, R).

    Returns:
        ``sum_i phi_ir ** 2``, (R,).
    """
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
    constraints = np.vstack([order_constraints(edges, len(prior)), eye, -eye])
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
