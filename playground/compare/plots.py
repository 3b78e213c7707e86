"""The figures of the results page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fuzzyroe.plots import LIGHT, Theme, new_figure, style_axes
from playground.compare.answers import TRAINED
from playground.compare.cells import PLANNED, ROUTER_BUDGETS, TARGETS
from playground.compare.page import LABELS, LOWEST_SHOWN
from playground.compare.summary import Results, Run

STYLES = {
    "roe": ("#c2571a", "s"),
    "fuzzy": ("#1f6fb2", "o"),
    "fuzzy_published": ("#7fb3de", "o"),
    "linear_score": ("#4b8f5a", "^"),
    "static": ("#8a6bb8", "v"),
    "random": ("#8c959f", "x"),
    "oracle": ("#1f2933", "*"),
}
"""Colour and mark of each method."""


def draw_accuracy(results: Results, theme: Theme = LIGHT) -> Figure:
    """Accuracy against the achieved skip rate, means over seeds; of RoE, each of its trainings is a point.

    What lies below ``LOWEST_SHOWN`` is not shown.
    """
    figure = new_figure(7.0, 4.2, theme)
    axes = figure.subplots()
    dense = np.mean([results.run_at(cell, None).correct.mean() for cell in results.of("dense")])
    axes.axhline(100 * dense, color=theme.ink, linestyle="--", linewidth=1, label="dense")
    for method, (colour, mark) in STYLES.items():
        label, rates = LABELS[method], TARGETS if method in ("roe", "oracle") else PLANNED
        if method == "roe":
            asked = [[results.run_at(cell, TRAINED) for cell in results.of(method, rate)] for rate in rates]
            _draw_curve(axes, asked, colour, mark, f"{label}, as trained", linestyle="", fillstyle="none")
            label = f"{label}, calibrated bias"
        asked = [[results.run_at(cell, rate) for cell in results.of(method, rate)] for rate in rates]
        _draw_curve(axes, asked, colour, mark, label)
    axes.set_ylim(LOWEST_SHOWN, 98)
    axes.set_xlabel("layers skipped, %")
    axes.set_ylabel("questions answered rightly, %")
    style_axes(axes, theme)
    axes.grid(color=theme.grid, linewidth=0.6)
    figure.legend(frameon=False, labelcolor=theme.ink, loc="outside right upper", fontsize=8)
    return figure


def draw_router_cost(results: Results, theme: Theme = LIGHT) -> Figure:
    """Accuracy with 30 % of the layers skipped against the passes that the router stage took, both methods."""
    figure = new_figure(6.4, 3.6, theme)
    axes = figure.subplots()
    for method, label in (("roe", "RoE, bias calibrated for 30 %"), ("fuzzy", "FuzzyRoE, at 30 %")):
        colour, mark = STYLES[method]
        levels = [results.at_level(method, level) for level in ROUTER_BUDGETS]
        asked = [[_at_30_percent(results, cell) for cell in cells] for cells in levels if cells]
        passes = [np.mean([results.router_cost(cell)["passes"] for cell in cells]) for cells in levels if cells]
        if asked:
            axes.vlines(passes, [min(found) for found in asked], [max(found) for found in asked], color=colour)
            axes.plot(
                passes, [np.mean(found) for found in asked], marker=mark, color=colour, linewidth=1.5, label=label
            )
    axes.set_xscale("log")
    axes.set_xticks([150, 300, 1000, 3000], ["150", "300", "1,000", "3,000"])
    axes.minorticks_off()
    axes.set_xlabel("passes of the router stage; bars from the lowest seed to the highest")
    axes.set_ylabel("answered rightly, %")
    style_axes(axes, theme)
    axes.grid(color=theme.grid, linewidth=0.6)
    figure.legend(frameon=False, labelcolor=theme.ink, loc="outside lower left", fontsize=8)
    return figure


def _at_30_percent(results: Results, cell: dict[str, Any]) -> float:
    """Accuracy of a cell in percent; RoE's rates jump, so its own point is taken instead of one between two."""
    is_linear = cell["method"].startswith("roe")
    run = results.run_at(cell, 0.3) if is_linear else results.at_skip_rate(cell, 0.3)
    return 100 * float(run.correct.mean())


def _draw_curve(
    axes: Axes, asked: Sequence[Sequence[Run]], colour: str, mark: str, label: str, linestyle: str = "-", **style: Any
) -> None:
    asked = [runs for runs in asked if runs]
    if asked:
        rates = [100 * np.mean([run.skip_rate for run in runs]) for runs in asked]
        means = [100 * np.mean([run.correct.mean() for run in runs]) for runs in asked]
        lines = {"linestyle": linestyle, "linewidth": 1.5, "markersize": 6, **style}
        axes.plot(rates, means, marker=mark, color=colour, label=label, **lines)
