"""Fuzzy rule interpolation of Koczy and Hirota (KH): both ends of every alpha-cut are interpolated by themselves.

The ends can cross; such a conclusion is no fuzzy set and is refused here. For trapezoids only the cuts at 0 and 1 are
computed and the sides are taken to be straight, as usual.

Reference:
    Koczy and Hirota, "Approximate reasoning by linear rule interpolation and general approximation", IJAR 9, 1993;
    Tikk, Joo, Koczy et al., "Stability of interpolative fuzzy KH controllers", FSS 125, 2002 (all rules, power =
    dimension).
"""

from __future__ import annotations

import numpy as np

from fuzzyroe.rules.fuzzy_set import is_valid


def conclude(
    observation: np.ndarray,
    antecedents: np.ndarray,
    consequents: np.ndarray,
    ranges: np.ndarray,
    power: float = 1.0,
) -> np.ndarray:
    """Interpolate the consequents with weights ``distance ** -power`` per end.

    Args:
        observation: Observed sets, (D, 4).
        antecedents: Sets of the N rules, (N, D, 4); two flanking ones in the original method.
        consequents: Their consequents, (N, 4).
        ranges: Widths of the universes, (D,).
        power: 1 for the original method; the number of antecedents D for the stabilised one.

    Returns:
        The conclusion, (4,).

    Raises:
        ValueError: If ends cross, so that the conclusion is no fuzzy set.
    """
    distances = np.linalg.norm((antecedents - observation) / ranges[:, None], axis=1)  # (N, 4)
    conclusion = np.array([_weighted_mean(distances[:, end], consequents[:, end], power) for end in range(4)])
    if not is_valid(conclusion):
        raise ValueError(
            f"The Koczy-Hirota conclusion {conclusion.round(4).tolist()} is no fuzzy set: its points must not "
            "decrease; use method 'scale_and_move'."
        )
    return conclusion


def _weighted_mean(distances: np.ndarray, values: np.ndarray, power: float) -> float:
    """Average with inverse distances; rules at distance zero decide alone."""
    if (distances == 0).any():
        return float(values[distances == 0].mean())
    weights = (distances / distances.min()) ** -power
    return float(weights @ values / weights.sum())
