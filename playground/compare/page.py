"""The results page, written from the cells alone: the same cells give the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from playground.compare.answers import TRAINED, Point
from playground.compare.cells import MAIN_BUDGET, ROUTER_BUDGETS, TARGETS
from playground.compare.summary import Interval, Results, Run
from playground.compare.verdicts import bars

LOWEST_SHOWN = 84
"""Lowest accuracy in the figure, in percent."""

LABELS = {
    "roe": "RoE",
    "fuzzy": "FuzzyRoE, shipped antecedents",
    "fuzzy_published": "FuzzyRoE, published antecedents",
    "linear_score": "linear score, 4 parameters",
    "static": "static skip",
    "random": "random skip",
    "oracle": "oracle (a bound)",
}
"""Methods in the order of the tables."""

ABLATIONS = {
    "roe_no_adapter": "RoE without adapters",
    "roe_no_hinge": "RoE without regularisation",
    "roe_pooled": "RoE without routing tokens (pooled states)",
    "roe_front": "RoE, tokens in front of the prompt as published",
    "fuzzy_no_adapter": "FuzzyRoE without adapters",
}

READING_FILE = "reading.md"
"""A person's reading of the cells, beside them; its first line names the cells that it was written about."""


def write_page(results: Results, reading: str = "") -> str:
    """Give the page as Markdown, one line break at its end.

    Args:
        results: The cells; all numbers and verdicts are computed from them.
        reading: Text of ``READING_FILE``; left out unless it was written about exactly these cells.
    """
    dense = results.of("dense")
    about, _, text = reading.partition("\n")
    environment = Environment(
        loader=PackageLoader("playground.compare", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    page = environment.get_template("results.md.jinja").render(
        questions=f"{dense[0]['questions']:,}",
        seeds=len(dense),
        budget=MAIN_BUDGET,
        bars="\n".join(bars(results)),
        dense=_accuracy([results.run_at(cell, None) for cell in dense]),
        lowest=LOWEST_SHOWN,
        methods={f"{100 * target:.0f}": _methods_table(results, target) for target in TARGETS},
        equal=_equal_table(results),
        costs=_cost_table(results),
        sizes="; ".join(f"{level} %: {', '.join(map(str, numbers))}" for level, numbers in ROUTER_BUDGETS.items()),
        bias_passes=14 * 32,
        levels=_level_table(results),
        ablations=_ablation_table(results),
        reading=text.strip() if about == reading_mark(results) else "",
    )
    return page.rstrip() + "\n"


def reading_mark(results: Results) -> str:
    """Give the first line of a reading of these cells: other cells have another."""
    content = json.dumps(results.cells, sort_keys=True)
    return f"<!-- read from cells {hashlib.sha256(content.encode()).hexdigest()[:16]} -->"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def points(found: Interval) -> str:
    """A difference in points with its interval."""
    return f"{100 * found.mean:+.1f} [{100 * found.lower:+.1f}, {100 * found.upper:+.1f}]"


def _accuracy(runs: Sequence[Run]) -> str:
    found = [100 * float(run.correct.mean()) for run in runs]
    return f"{np.mean(found):.1f} [{min(found):.1f}, {max(found):.1f}]"


def _percent(values: Iterable[float]) -> str:
    return f"{100 * float(np.mean(list(values))):.1f}"


def _variants(method: str, target: float) -> list[tuple[str, Point]]:
    """Rows of a method in the table of a target: name and what it was asked for."""
    label = LABELS[method]
    if method != "roe":
        return [(label, target)]
    return [(f"{label}, as trained", TRAINED), (f"{label}, calibrated bias", target)]


def _row(results: Results, cells: list[dict[str, Any]], label: str, runs: list[Run]) -> list[str]:
    pairs = [(run.correct, results.dense(cell)) for cell, run in zip(cells, runs, strict=True)]
    return [
        label,
        _accuracy(runs),
        points(results.difference(pairs)),
        _percent(run.agreement for run in runs),
        _percent(run.skip_rate for run in runs),
        f"{np.mean([run.time_ratio for run in runs]):.2f}",
    ]


def _methods_table(results: Results, target: float) -> str:
    rows = []
    for method in LABELS:
        cells = results.of(method, target)
        for label, point in _variants(method, target):
            if cells:
                rows.append(_row(results, cells, label, [results.run_at(cell, point) for cell in cells]))
    return table(["", "accuracy, %", "minus dense", "agreement, %", "skip, %", "time"], rows)


def _equal_table(results: Results) -> str:
    head, rows = [""], {method: [LABELS[method]] for method in LABELS if method not in ("roe", "oracle")}
    for target in TARGETS:
        references = {cell["seed"]: results.run_at(cell, TRAINED) for cell in results.of("roe", target)}
        if not references:
            continue
        head.append(f"at {_percent(run.skip_rate for run in references.values())} %")
        for method, row in rows.items():
            pairs = []
            for cell in results.of(method):
                if cell["seed"] in references:
                    reference = references[cell["seed"]]
                    pairs.append((results.at_skip_rate(cell, reference.skip_rate).correct, reference.correct))
            row.append(points(results.difference(pairs)) if pairs else "")
    return table(head, rows.values())


def _cost_table(results: Results) -> str:
    rows = []
    for method, label in LABELS.items():
        cells = results.of(method, 0.3)
        if not cells or method == "oracle":
            continue
        router, total = ([cost(cell) for cell in cells] for cost in (results.router_cost, results.total_cost))

        def mean(costs: list[dict[str, float]], name: str) -> str:
            return f"{np.mean([cost[name] for cost in costs]):,.0f}"

        rows.append(
            [label, *(mean(router, name) for name in ("steps", "examples", "passes", "seconds"))]
            + [mean(total, "examples"), mean(total, "seconds"), "3" if method == "roe" else "1"]
        )
    totals = [results.total_cost(cell) for cell in results.of("dense")]
    rows.append(["dense", "", "", "", "", *(f"{np.mean([t[n] for t in totals]):,.0f}" for n in totals[0]), "1"])
    head = ["", "router steps", "samples", "passes", "seconds", "total samples", "total seconds", "trainings"]
    return table(head, rows)


def _level_table(results: Results) -> str:
    rows = []
    for level in ROUTER_BUDGETS:
        roe, fuzzy = results.at_level("roe", level), results.at_level("fuzzy", level)
        fuzzy = [cell for cell in fuzzy if cell["seed"] in {other["seed"] for other in roe}]
        if not roe or not fuzzy:
            continue
        trained, calibrated = ([results.run_at(cell, point) for cell in roe] for point in (TRAINED, 0.3))
        equal = [
            (results.at_skip_rate(mine, theirs.skip_rate).correct, theirs.correct)
            for mine, theirs in zip(fuzzy, calibrated, strict=True)
        ]
        mine = [results.run_at(cell, 0.3) for cell in fuzzy]
        cost = [np.mean([results.router_cost(cell)[name] for cell in cells]) for name in ("passes", "seconds")
                for cells in (roe, fuzzy)]  # fmt: skip
        rows.append(
            [f"{level} %", f"{cost[0]:,.0f}; {cost[2]:.0f} s", _at(trained), _at(calibrated)]
            + [f"{cost[1]:,.0f}; {cost[3]:.0f} s", _at(mine), points(results.difference(equal))]
        )
    head = ["share", "RoE: passes; time", "as trained", "calibrated bias", "FuzzyRoE: passes; time", "at 30 %"]
    return table([*head, "minus RoE, calibrated, at its skip rate"], rows)


def _at(runs: Sequence[Run]) -> str:
    return f"{_percent(float(run.correct.mean()) for run in runs)} % at {_percent(run.skip_rate for run in runs)} %"


def _ablation_table(results: Results) -> str:
    rows = []
    for method, label in {"roe": "RoE", **ABLATIONS}.items():
        whole = {cell["seed"]: cell for cell in results.of(method.split("_")[0], 0.3)}
        cells = [cell for cell in results.of(method, 0.3) if cell["seed"] in whole]
        if not cells:
            continue
        is_linear = method.startswith("roe")
        own = [results.run_at(cell, TRAINED if is_linear else 0.3) for cell in cells]
        calibrated = [results.run_at(cell, 0.3) for cell in cells]
        pairs = [
            (run.correct, results.run_at(whole[cell["seed"]], 0.3).correct)
            for cell, run in zip(cells, calibrated, strict=True)
        ]
        against = "" if method == "roe" else points(results.difference(pairs))
        rows.append([label, _at(own) if is_linear else "", _at(calibrated), against])
    return table(["", "as trained", "calibrated bias, or planned for 30 %", "minus the whole method"], rows)
