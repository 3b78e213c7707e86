"""The figures of the results page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fuzzyroe.plots import LIGHT, Theme, new_figure, style_axes
from playground.compare.arms import ARMS, MAIN_TARGET, PLANNED, SHARES, TRAINED, Point, arms_of, at_share
from playground.compare.summary import at_rates, pick

LOWEST_SHOWN = 84
"""Lowest accuracy in the figure, in percent."""


def draw_accuracy(runs: pd.DataFrame, theme: Theme = LIGHT) -> Figure:
    """Accuracy against the observed skip rate, means over seeds; of RoE, each of its trainings is a point.

    What lies below ``LOWEST_SHOWN`` is not shown.
    """
    figure = new_figure(7.0, 4.2, theme)
    axes = figure.subplots()
    dense = np.mean([correct.mean() for correct in pick(runs, "dense", "dense").correct])
    axes.axhline(100 * dense, color=theme.ink, linestyle="--", linewidth=1, label="dense")

    def draw(method: str, asked: list[tuple[Point, float | None]], label: str, **style: Any) -> None:
        found = [own for own in (pick(runs, method, point, target) for point, target in asked) if len(own)]
        if found:
            rates = [100 * own.rate.mean() for own in found]
            means = [100 * own.correct.map(np.mean).mean() for own in found]
            axes.plot(rates, means, label=label, **{"linestyle": "-", "linewidth": 1.5, "markersize": 6, **style})

    for arm in arms_of("methods")[1:]:
        style, label = dict(zip(("color", "marker"), arm.style, strict=True)), arm.label
        rates = [rate for rate in PLANNED if rate in (*arm.points, *arm.targets)]
        if arm.has_trained_point:
            open_marks = {"linestyle": "", "fillstyle": "none", **style}
            draw(arm.method, [(TRAINED, rate) for rate in rates], f"{label}, as trained", **open_marks)
            label = f"{label}, calibrated bias"
        draw(arm.method, [(rate, rate) for rate in rates], label, **style)
    axes.set_ylim(LOWEST_SHOWN, 98)
    axes.set_xlabel("layers skipped, %")
    axes.set_ylabel("questions answered rightly, %")
    _finish(figure, theme, "outside right upper")
    return figure


def draw_router_cost(runs: pd.DataFrame, theme: Theme = LIGHT) -> Figure:
    """Accuracy with 30 % of the layers skipped against the passes that the router stage took, both methods."""
    figure = new_figure(6.4, 3.6, theme)
    axes = figure.subplots()
    styles = {arm.method: arm.style for arm in ARMS}
    for method, label in (("roe", "RoE, bias calibrated for 30 %"), ("fuzzy", "FuzzyRoE, at 30 %")):
        colour, mark = styles[method]
        passes, asked = [], []
        for share in SHARES:
            own = pick(runs, at_share(method, share), MAIN_TARGET)
            if len(own):
                passes.append(own.router_passes.mean())
                # RoE's rates jump, so its own point is taken instead of one between two
                planned = pd.Series(MAIN_TARGET, index=own.index)
                taken = own if method == "roe" else at_rates(runs, at_share(method, share), planned)
                asked.append([100 * correct.mean() for correct in taken.correct])
        if asked:
            axes.vlines(passes, [min(found) for found in asked], [max(found) for found in asked], color=colour)
            means = [np.mean(found) for found in asked]
            axes.plot(passes, means, marker=mark, color=colour, linewidth=1.5, label=label)
    axes.set_xscale("log")
    axes.set_xticks([150, 300, 1000, 3000], ["150", "300", "1,000", "3,000"])
    axes.minorticks_off()
    axes.set_xlabel("passes of the router stage; bars from the lowest seed to the highest")
    axes.set_ylabel("answered rightly, %")
    _finish(figure, theme, "outside lower left")
    return figure


def _finish(figure: Figure, theme: Theme, place: str) -> None:
    style_axes(figure.axes[0], theme)
    figure.axes[0].grid(color=theme.grid, linewidth=0.6)
    figure.legend(frameon=False, labelcolor=theme.ink, loc=place, fontsize=8)
