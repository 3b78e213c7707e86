"""The results page and its figures, written from the cells alone: the same cells give the same bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from fuzzyroe.plots import LIGHT, Theme, new_figure, render_svg, style_axes
from playground.compare import arms
from playground.compare.arms import MAIN_TARGET, SHARES, TARGETS, TRAINED, Arm, Point, arms_of, at_share
from playground.compare.summary import Cells, at_rates, difference, make_runs, of, pick, read_cells, reading_mark
from playground.compare.verdicts import judge, judge_savings

DENSE, *METHODS = arms_of("methods")

LOWEST_SHOWN = 84
"""Lowest accuracy in the figure, in percent."""

READING_FILE = "reading.md"
"""A person's reading of the cells, beside them; its first line names the cells that it was written about."""


def write(folder: Path, output: Path) -> None:
    """Write the page of a folder of cells beside ``output``, and its figures into it."""
    output.mkdir(parents=True, exist_ok=True)
    cells, file = read_cells(folder), output / READING_FILE
    reading = file.read_text(encoding="utf-8") if file.exists() else ""
    if reading and not reading.startswith(reading_mark(cells)):
        print(f"compare: {file} is about other cells and left out; read these and begin it with {reading_mark(cells)}")
    for name, text in render(cells, reading).items():
        path = output.with_suffix(".md") if name == "results.md" else output / name
        path.write_text(text, encoding="utf-8")
        print(f"compare: {path} written")


def render(cells: Cells, reading: str = "") -> dict[str, str]:
    """The page, under the name ``results.md``, and its figures, by file name; ``reading`` as for ``write_page``."""
    figures = {"accuracy.svg": draw_accuracy, "router_cost.svg": draw_router_cost}
    drawn = {name: render_svg(functools.partial(draw, make_runs(cells))) for name, draw in figures.items()}
    return {"results.md": write_page(cells, reading), **drawn}


def write_page(cells: Cells, reading: str = "") -> str:
    """Give the page as Markdown, one line break at its end.

    Args:
        cells: The cells; all numbers and verdicts are computed from them.
        reading: Text of ``READING_FILE``; left out unless it was written about exactly these cells.
    """
    runs = make_runs(cells)
    about, _, text = reading.partition("\n")
    style = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True, "autoescape": False}
    environment = Environment(loader=PackageLoader("playground.compare", "."), **style)
    environment.filters |= {"accuracy": accuracy, "percent": percent, "at": at, "mean": lambda v: f"{v.mean():,.0f}"}
    environment.filters["points"] = lambda found: str(found).replace(" ", " points ", 1)
    page = environment.get_template("results.md.jinja").render(
        budget=arms.MAIN_SHARE,
        verdicts=judge(runs),
        savings=judge_savings(runs),
        dense=pick(runs, "dense", "dense"),
        lowest=LOWEST_SHOWN,
        sizes="; ".join(f"{share} %: {', '.join(map(str, numbers[:3]))}" for share, numbers in SHARES.items()),
        bias_passes=14 * 32,
        reading=text.strip() if about == reading_mark(cells) else "",
        **tables(runs),
    )
    return page.rstrip() + "\n"


def accuracy(runs: pd.DataFrame) -> str:
    """Mean accuracy of runs, and that of the lowest and the highest, in percent."""
    means = 100 * runs.correct.map(np.mean)
    return f"{means.mean():.1f} [{means.min():.1f}, {means.max():.1f}]"


def percent(values: Iterable[float]) -> str:
    """A mean in percent."""
    return f"{100 * float(np.mean([*values])):.1f}"


def at(runs: pd.DataFrame) -> str:
    """Mean accuracy at a mean skip rate; empty without runs."""
    return f"{percent(runs.correct.map(np.mean))} % at {percent(runs.rate)} %" if len(runs) else ""


def ways_to_ask(arm: Arm, target: float) -> dict[str, Point]:
    """Rows of an arm in the table of a target, with what it was asked for."""
    if not arm.has_trained_point:
        return {arm.label: target}
    return {f"{arm.label}, as trained": TRAINED, f"{arm.label}, calibrated bias": target}


def tables(runs: pd.DataFrame) -> dict[str, Any]:
    """The runs that stand in the rows of each table; arms that have not been run have none."""
    methods = {
        f"{100 * target:.0f}": [
            (label, asked, difference(asked.correct, asked.dense))
            for arm in METHODS
            for label, point in ways_to_ask(arm, target).items()
            if len(asked := pick(runs, arm.method, point, target))
        ]
        for target in TARGETS
    }
    # each method that plans ahead, at the rates that RoE as trained reached
    trained = [roe for target in TARGETS if len(roe := pick(runs, "roe", TRAINED, target))]
    equal = [
        (arm.label, [difference(at_rates(runs, arm.method, roe.rate).correct, roe.correct) for roe in trained])
        for arm in METHODS
        if arm.policy == "own" and not arm.has_trained_point
    ]
    costs = [
        (arm, cells)
        for arm in (*METHODS, DENSE)
        if arm.policy == "own" and len(cells := of(runs, arm.method).drop_duplicates("cell"))
    ]
    shares = []
    for share in SHARES:
        method, roe = at_share("fuzzy", share), at_share("roe", share)
        calibrated, fuzzy = (pick(runs, name, MAIN_TARGET) for name in (roe, method))
        fuzzy = fuzzy[fuzzy.index.isin(calibrated.index)]
        if len(fuzzy):
            minus_roe = difference(at_rates(runs, method, calibrated.rate).correct, calibrated.correct)
            shares.append((share, pick(runs, roe, TRAINED), calibrated, fuzzy, minus_roe))
    ablations = []
    for arm in (*(arm for arm in METHODS if arm.method == "roe"), *arms_of("ablation")):
        own, whole = (pick(runs, method, MAIN_TARGET) for method in (arm.method, arm.part_of or arm.method))
        if len(own.index.intersection(whole.index)):
            against = difference(own.correct, whole.correct) if arm.part_of else ""
            ablations.append((arm.label, pick(runs, arm.method, TRAINED), own, against))
    found = {"methods": methods, "equal": equal, "costs": costs, "shares": shares, "ablations": ablations}
    return {**found, "reached": [roe.rate for roe in trained]}


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
        rates = [rate for rate in arms.PLANNED if rate in (*arm.points, *arm.targets)]
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
    styles = {arm.method: arm.style for arm in arms.ARMS}
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
