"""Control surfaces: any scikit-fuzzy system, tabulated once and looked up in torch.

Zero-order TSK needs no grid, its rule table is the surface. A Mamdani system (Gaussian or trapezoid terms, minimum,
maximum, centroid) has no such table, so it is evaluated by scikit-fuzzy on a grid, and values between grid points are
interpolated multilinearly. That is a zero-order TSK rule base with a term per grid point, of which only the two next to
an input fire.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuzzyroe.rules import oracle
from fuzzyroe.rules.inference import ZeroOrderTSK

CONFIDENCE = 0.999
CHUNK = 4096
"""Points that are evaluated at once."""


@dataclass(frozen=True)
class ErrorBound:
    """How far a surface may be from what it tabulates.

    Measured at n random points of the universes. If the share of points beyond the largest error seen were more than
    ``exceedance``, n draws would have met one of them with probability ``confidence``: ``(1 - exceedance)^n = 1 -
    confidence``, whatever the system.

    Attributes:
        largest: Largest error seen, in units of the output.
        mean: Mean error.
        exceedance: Share of the universe that may be worse.
        confidence: Probability that this holds.

    Reference:
        Wilks, "Determination of sample sizes for setting tolerance limits", Annals of Mathematical Statistics 12, 1941.
    """

    largest: float
    mean: float
    exceedance: float
    confidence: float = CONFIDENCE


class ControlSurface(ZeroOrderTSK):
    """A tabulated function of the features with multilinear interpolation; outside the grid it stays constant.

    Only the 2^K corners of an input's cell are read, so the cost does not depend on the grid. Differentiable in the
    features and the table, no data-dependent control flow, no waiting for a device.

    Attributes:
        bound: Measured error, None if the table is all there is.
    """

    bound: ErrorBound | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Look outputs up.

        Args:
            features: Feature vectors, (..., K).

        Returns:
            Outputs, (...,) or (..., outputs), in float32 (float64 for float64 features).
        """
        features, is_broken = self._guard(features)
        table = self.consequents.to(features.dtype)
        index = torch.zeros(*features.shape[:-1], 1, dtype=torch.long, device=features.device)  # (..., corners)
        weight = torch.ones_like(features[..., :1])
        for axis, count in enumerate(self.term_counts):
            knots = self.knots[axis, :count].to(features.dtype)
            values = features[..., axis].contiguous()
            cell = torch.searchsorted(knots, values.detach(), right=True).clamp(1, count - 1) - 1  # (...)
            share = ((values - knots[cell]) / (knots[cell + 1] - knots[cell])).clamp(0, 1)
            index = (count * index.unsqueeze(-1) + torch.stack([cell, cell + 1], dim=-1).unsqueeze(-2)).flatten(-2)
            weight = (weight.unsqueeze(-1) * torch.stack([1 - share, share], dim=-1).unsqueeze(-2)).flatten(-2)
        corners = table[index]  # (..., 2^K) or (..., 2^K, outputs)
        outputs = (weight if table.ndim == 1 else weight.unsqueeze(-1)).mul(corners).sum(dim=weight.ndim - 1)
        return outputs.masked_fill(is_broken if table.ndim == 1 else is_broken.unsqueeze(-1), self.non_finite)


def tabulate(
    function: Callable[[np.ndarray], np.ndarray],
    kinks: Sequence[Sequence[float]],
    points_per_feature: int = 17,
    non_finite: float = 1.0,
    num_checks: int = 4000,
    seed: int = 0,
) -> ControlSurface:
    """Tabulate a function and measure how far the table is from it.

    Args:
        function: Gives outputs (n,) of feature vectors (n, K).
        kinks: Per feature, increasing values that must be grid points: the ends of its universe, and where the function
            bends. Interpolation across a bend would cost accuracy.
        points_per_feature: No two grid points of a feature are further apart than its universe divided by this number
            less one.
        non_finite: Output of an example with a nan or infinite feature.
        num_checks: Random points at which the error is measured.
        seed: Seed of these points.

    Returns:
        The surface, with its measured ``bound``.

    Raises:
        ValueError: If the grid is too coarse to be one, or the function is not finite somewhere.
    """
    if points_per_feature < 2 or num_checks < 1:
        raise ValueError(
            f"points_per_feature is {points_per_feature} and num_checks {num_checks}; at least 2 and 1 are allowed; "
            "17 and 4000 are usual."
        )
    grid = [_refine(np.asarray(row, dtype=np.float64), points_per_feature) for row in kinks]
    table = _evaluate(function, np.array(list(itertools.product(*grid))))
    surface = ControlSurface(grid, table, non_finite)
    lower, upper = np.array([(row[0], row[-1]) for row in grid]).T
    points = np.random.default_rng(seed).uniform(lower, upper, (num_checks, len(grid)))
    with torch.no_grad():
        errors = np.abs(surface(torch.from_numpy(points)).numpy() - _evaluate(function, points))
    exceedance = 1 - (1 - CONFIDENCE) ** (1 / num_checks)
    surface.bound = ErrorBound(float(errors.max()), float(errors.mean()), exceedance)
    return surface


def tabulate_control_system(
    system: oracle.control.ControlSystem, antecedents: Sequence[str], consequent: str, **options: float
) -> ControlSurface:
    """Tabulate any scikit-fuzzy system: terms of any shape, any operators, any defuzzification.

    The system is evaluated about ``points_per_feature ** K + num_checks`` times at 0.3 ms. Where minimum and maximum
    switch from one rule to another the surface bends inside cells, so twice the points only halve the largest error.

    Args:
        system: The system; it is left as it is.
        antecedents: Names of its antecedents, in the order of the features.
        consequent: Name of its consequent.
        **options: ``points_per_feature``, ``non_finite``, ``num_checks``, ``seed``, see ``tabulate``.

    Returns:
        The surface, with its measured ``bound``.

    Raises:
        ValueError: If a name is unknown, or some point fires no rule.
    """
    known = {node.label: node for node in system.antecedents}
    if set(antecedents) != set(known):
        raise ValueError(
            f"The antecedents {list(antecedents)} were named; {sorted(known)} are those of the system; name all, in "
            "the order of the features."
        )

    def evaluate(points: np.ndarray) -> np.ndarray:
        try:
            return oracle.evaluate(system, points, antecedents, consequent)
        except AssertionError as error:  # scikit-fuzzy's EmptyMembershipError
            raise ValueError(
                f"Some point fires no rule of '{consequent}'; every point must fire one; add rules or widen terms."
            ) from error

    nodes = [known[name] for name in antecedents]
    kinks = [_find_kinks(node.universe, [term.mf for term in node.terms.values()]) for node in nodes]
    return tabulate(evaluate, kinks, **options)


def _find_kinks(universe: np.ndarray, memberships: Sequence[np.ndarray]) -> np.ndarray:
    """Give the ends of a universe with the points at which a membership leaves 0 or its maximum."""
    is_kink = np.zeros(len(universe), dtype=bool)
    is_kink[[0, -1]] = True
    for membership in memberships:
        for flat in (membership <= 0, membership >= membership.max()):
            changes = np.flatnonzero(np.diff(flat.astype(np.int8)))
            # the last flat point before a rise, the first one after a fall
            is_kink[np.where(flat[changes], changes, changes + 1)] = True
    return universe[is_kink]


def _refine(kinks: np.ndarray, points: int) -> np.ndarray:
    """Fill the gaps between kinks with equally spaced points."""
    largest = (kinks[-1] - kinks[0]) / (points - 1)
    pieces = [
        np.linspace(left, right, max(1, math.ceil((right - left) / largest - 1e-9)), endpoint=False)
        for left, right in itertools.pairwise(kinks)
    ]
    return np.concatenate([*pieces, kinks[-1:]])


def _evaluate(function: Callable[[np.ndarray], np.ndarray], points: np.ndarray) -> np.ndarray:
    """Evaluate in chunks, (n,)."""
    outputs = np.concatenate([function(points[start : start + CHUNK]) for start in range(0, len(points), CHUNK)])
    if not np.isfinite(outputs).all():
        raise ValueError(
            f"The function gives {int((~np.isfinite(outputs)).sum())} non-finite outputs on its grid; finite ones are "
            "allowed; cover every combination of terms by a rule."
        )
    return outputs
