"""What the comparison was to show, as data, and whether it does."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from playground.compare.arms import MAIN_SHARE, MAIN_TARGET, TRAINED, Point, at_share
from playground.compare.summary import Interval, compare

NEAR_ROE, NEAR_DENSE = -0.01, -0.02
"""What FuzzyRoE may lose against RoE at equal skip, and against the dense model."""


class Hypothesis(NamedTuple):
    """One line of the verdicts: two arms that are compared."""

    title: str  # what is claimed
    method: str
    other: str
    point: Point  # at which skip rate, see ``summary.compare``
    at_least: float | None = (
        None  # bar of the difference; None for a question, answered by whether the interval holds 0
    )


AT_30 = "30 % of the layers skipped"

HYPOTHESES = (
    Hypothesis("FuzzyRoE within 1 point of RoE at equal skip, target 30 %", "fuzzy", "roe", TRAINED, NEAR_ROE),
    Hypothesis(f"FuzzyRoE with {AT_30} within 2 points of dense", "fuzzy", "dense", MAIN_TARGET, NEAR_DENSE),
    Hypothesis("RoE better than random skip at its own skip rate, target 30 %", "roe", "random", TRAINED),
    Hypothesis("RoE better than static skip at its own skip rate, target 30 %", "roe", "static", TRAINED),
    Hypothesis(f"FuzzyRoE better than static skip, {AT_30}", "fuzzy", "static", MAIN_TARGET),
    Hypothesis(f"The rule base better than a linear score, {AT_30}", "fuzzy", "linear_score", MAIN_TARGET),
    Hypothesis(f"Shipped antecedents better than the published ones, {AT_30}", "fuzzy", "fuzzy_published", MAIN_TARGET),
)

SAVINGS = (MAIN_SHARE, 5)
"""Percentages of RoE's router stage at which the published claim is tried: as little is enough for FuzzyRoE only."""


def judge(runs: pd.DataFrame) -> list[tuple[str, str, Interval]]:
    """Title, verdict and difference of each hypothesis whose arms have been run."""
    judged = []
    for title, method, other, point, at_least in HYPOTHESES:
        found = compare(runs, method, other, point)
        if found is None:
            continue
        if at_least is not None:
            verdict = "met" if found.mean >= at_least else "not met"
        else:
            verdict = "yes" if found.lower > 0 else "no" if found.upper < 0 else "not clearly"
        judged.append((title, verdict, found))
    return judged


def judge_savings(runs: pd.DataFrame) -> list[tuple[int, Interval, bool, Interval, bool]]:
    """The published saving at each share: it holds if FuzzyRoE is near the whole of RoE, and RoE with as little is not.

    Returns:
        Share; difference of FuzzyRoE from the whole of RoE, and whether it is near; difference of RoE cut to the share
        from FuzzyRoE, and whether it is worse.
    """
    judged = []
    for share in SAVINGS:
        near = compare(runs, at_share("fuzzy", share), "roe", TRAINED)
        cut = compare(runs, at_share("roe", share), at_share("fuzzy", share), MAIN_TARGET)
        if near is not None and cut is not None:
            judged.append((share, near, near.mean >= NEAR_ROE, cut, cut.upper < 0))
    return judged
