"""What the comparison was to show, and whether it does."""

from __future__ import annotations

from typing import Any

from playground.compare.answers import TRAINED
from playground.compare.cells import MAIN_BUDGET
from playground.compare.summary import Interval, Results

NEAR_ROE, NEAR_DENSE = -0.01, -0.02
"""What FuzzyRoE may lose against RoE at equal skip, and against the dense model."""


def bars(results: Results) -> list[str]:
    """One line for each bar and question that the cells can answer, met or not."""
    lines = []
    roe, fuzzy = results.of("roe", 0.3), results.of("fuzzy")
    if roe and fuzzy:
        against = compare_with_roe(results, fuzzy, roe)
        lines.append(_bar("FuzzyRoE within 1 point of RoE at equal skip, target 30 %", against, NEAR_ROE))
        pairs = [(results.at_skip_rate(cell, 0.3).correct, results.dense(cell)) for cell in fuzzy]
        against = results.difference(pairs)
        lines.append(_bar("FuzzyRoE with 30 % of the layers skipped within 2 points of dense", against, NEAR_DENSE))
    for better, worse, title in (
        ("roe", "random", "RoE better than random skip at its own skip rate, target 30 %"),
        ("roe", "static", "RoE better than static skip at its own skip rate, target 30 %"),
    ):
        cells = results.of(worse)
        if results.of(better, 0.3) and cells:
            found = compare_with_roe(results, cells, roe)
            lines.append(_question(title, Interval(-found.mean, -found.upper, -found.lower)))
    for worse, title in (
        ("static", "FuzzyRoE better than static skip, 30 % of the layers skipped"),
        ("linear_score", "The rule base better than a linear score, 30 % of the layers skipped"),
        ("fuzzy_published", "Shipped antecedents better than the published ones, 30 % of the layers skipped"),
    ):
        cells = results.of(worse)
        if cells and fuzzy:
            pairs = [
                (results.at_skip_rate(mine, 0.3).correct, results.at_skip_rate(theirs, 0.3).correct)
                for mine, theirs in zip(fuzzy, cells, strict=False)
            ]
            lines.append(_question(title, results.difference(pairs)))
    for level in (MAIN_BUDGET, 5):
        lines += _claim(results, level)
    return lines


def compare_with_roe(results: Results, cells: list[dict[str, Any]], roe: list[dict[str, Any]]) -> Interval:
    """Accuracy of cells minus that of RoE as trained, at its skip rate, seed by seed."""
    references = {cell["seed"]: results.run_at(cell, TRAINED) for cell in roe}
    pairs = [
        (results.at_skip_rate(cell, references[cell["seed"]].skip_rate).correct, references[cell["seed"]].correct)
        for cell in cells
        if cell["seed"] in references
    ]
    return results.difference(pairs)


def _claim(results: Results, level: int) -> list[str]:
    """Whether the published saving holds at a percentage of RoE's router stage."""
    fuzzy, roe = results.at_level("fuzzy", level), results.at_level("roe", level)
    whole = results.at_level("roe", 100)
    if not (fuzzy and roe and whole):
        return []
    near = compare_with_roe(results, fuzzy, whole)
    calibrated = {cell["seed"]: results.run_at(cell, 0.3) for cell in roe}
    pairs = [
        (calibrated[cell["seed"]].correct, results.at_skip_rate(cell, calibrated[cell["seed"]].skip_rate).correct)
        for cell in fuzzy
        if cell["seed"] in calibrated
    ]
    cut = results.difference(pairs)
    is_near, is_worse = near.mean >= NEAR_ROE, cut.upper < 0
    verdict = "holds" if is_near and is_worse else "does not hold"
    second = "is worse" if is_worse else "is not worse" if cut.mean >= 0 else "is not clearly worse"
    title = f"{100 - level} % of the router stage saved"
    return [
        f"- **{title}: {verdict}.** FuzzyRoE fitted by {level} % of the passes of RoE's router stage: {_points(near)} "
        f"against the whole of RoE ({'within' if is_near else 'not within'} 1 point); RoE with {level} % of its router "
        f"stage, bias calibrated, {second} than it at equal skip: {_points(cut)}."
    ]


def _bar(title: str, found: Interval, bar: float) -> str:
    return f"- **{title}: {'met' if found.mean >= bar else 'not met'}.** {_points(found)}."


def _question(title: str, found: Interval) -> str:
    answer = "yes" if found.lower > 0 else "no" if found.upper < 0 else "not clearly"
    return f"- **{title}: {answer}.** {_points(found)}."


def _points(found: Interval) -> str:
    return f"{100 * found.mean:+.1f} points [{100 * found.lower:+.1f}, {100 * found.upper:+.1f}]"
