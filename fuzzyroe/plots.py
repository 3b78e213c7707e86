"""Figures of rules and routing, drawn without a display; the theme of each makes it one for light or for dark pages."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fuzzyroe.rules.explain import evidence_of
from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.variable import LinguisticVariable

GRID_POINTS = 61
MAX_ANNOTATED_LAYERS = 16
"""With more layers than this the numbers in the cells of a heat map would overlap."""


@dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
        surface: Background of the page.
        ink: Text and axes.
        grid: Lines that stay behind.
        main: Runs that skip layers, and the full end of the heat map.
        second: Dense runs.
        ramp: First and last colour of ordered terms.
    """

    surface: str
    ink: str
    grid: str
    main: str
    second: str
    ramp: tuple[str, str]

    def ordered(self, count: int) -> list[Any]:
        """Colours of terms from low to high."""
        ramp = LinearSegmentedColormap.from_list("terms", self.ramp)
        return [ramp(position) for position in np.linspace(0, 1, count)]

    def heat(self) -> Colormap:
        """Colours from 0 (the page) to 1."""
        return LinearSegmentedColormap.from_list("heat", [self.surface, self.main])


LIGHT = Theme("#ffffff", "#1f2933", "#d8dee4", "#1f6fb2", "#c2571a", ("#7fb3de", "#0b3d6b"))
DARK = Theme("#14181d", "#e3e8ee", "#39424c", "#63b0f0", "#f29b5c", ("#5b93c6", "#d6ebff"))

Draw = Callable[[Theme], Figure]


@dataclass(frozen=True)
class SkipPoint:
    """One run in the plane of skip rate and accuracy.

    Attributes:
        label: Name of the run.
        skip_rate: Observed skip rate in [0, 1].
        accuracy: Accuracy in [0, 1].
        is_dense: Whether it ran every layer.
        interval: Lower and upper accuracy to draw as whiskers; None for none.
    """

    label: str
    skip_rate: float
    accuracy: float
    is_dense: bool
    interval: tuple[float, float] | None = None


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.surface)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Any, theme: Theme) -> None:
    """Give axes the colours of a theme, and lines on their left and below only."""
    axes.set_facecolor(theme.surface)
    axes.tick_params(colors=theme.ink, labelsize=8)
    axes.xaxis.label.set(color=theme.ink, size=9)
    axes.yaxis.label.set(color=theme.ink, size=9)
    for side, spine in axes.spines.items():
        spine.set_color(theme.grid)
        spine.set_visible(side in ("left", "bottom"))


def draw_memberships(rule_base: FuzzyRuleBase, theme: Theme = LIGHT) -> Figure:
    """Draw the terms of every antecedent of any rule base, one below the other."""
    figure = new_figure(6.0, 1.75 * len(rule_base.antecedents), theme)
    panels = figure.subplots(len(rule_base.antecedents), 1, squeeze=False)[:, 0]
    for axes, variable in zip(panels, rule_base.antecedents, strict=True):
        _draw_variable(axes, variable, theme)
    return figure


def draw_control_surface(rule_base: FuzzyRuleBase, theme: Theme = LIGHT) -> Figure:
    """Draw the output of a complete rule base over its first two antecedents.

    The third one, if there is one, stands at the peak of each of its terms, a panel per term: between the peaks the
    output is linear in it, so the panels say everything. Further ones stand at their middle peaks. Colours span the
    consequents in use, and dotted lines mark the peaks.
    """
    if len(rule_base.antecedents) == 1:
        return _draw_curve(rule_base, theme)
    first, second, *others = rule_base.antecedents
    # a panel is its title with the values of the antecedents behind the first two
    rest = [variable.peaks[len(variable.peaks) // 2] for variable in others[1:]]
    levels: list[tuple[str, list[float]]] = [("", [])]
    for third in others[:1]:
        pairs = zip(third.terms, third.peaks, strict=True)
        levels = [(f"{_title(third.name)}: {term}", [peak, *rest]) for term, peak in pairs]
    figure = new_figure(2.6 * len(levels) + 1.2, 3.1, theme)
    panels = figure.subplots(1, len(levels), squeeze=False, sharey=True)[0]
    rows, columns = (np.linspace(*variable.universe, GRID_POINTS) for variable in (second, first))
    grid = np.stack([axis.ravel() for axis in np.meshgrid(columns, rows)], axis=1)  # (P, 2)
    lower, upper = float(rule_base.output_table.min()), float(rule_base.output_table.max())
    margin = 1e-6 if upper - lower > 1e-4 else 0.05  # values that rounding puts beyond the last level would be holes
    bands = np.linspace(lower - margin, upper + margin, 21)
    for axes, (title, fixed) in zip(panels, levels, strict=True):
        points = np.hstack([grid, np.tile(fixed, (len(grid), 1))])
        outputs = rule_base.evaluate(points).reshape(GRID_POINTS, GRID_POINTS)
        surface = axes.contourf(columns, rows, outputs, bands, cmap="cividis")
        surface.set_edgecolor("face")  # no hairlines between the bands
        for draw_line, variable in ((axes.axvline, first), (axes.axhline, second)):
            for peak in variable.peaks:
                draw_line(peak, color="#ffffff", linewidth=0.6, linestyle=":", alpha=0.6)
        style_axes(axes, theme)
        axes.set_xlabel(_title(first.name))
        axes.set_title(title, fontsize=9, color=theme.ink)
    panels[0].set_ylabel(_title(second.name))
    _colorbar(figure, surface, list(panels), _title(rule_base.consequent.name), theme)
    return figure


def draw_firing(rule_base: FuzzyRuleBase, theme: Theme = LIGHT) -> Figure:
    """Draw how many examples of the fit informed each rule: a column per term of the first antecedent.

    Raises:
        ValueError: If the rule base does not know what it was fitted to.
    """
    evidence = evidence_of(rule_base)
    if evidence is None:
        raise ValueError(f"Rule base '{rule_base.name}' was not fitted, so nothing fired; calibrate it first.")
    first, *others = rule_base.antecedents
    rows = [", ".join(terms) for terms in itertools.product(*(variable.terms for variable in others))]
    table = evidence.reshape(len(first.terms), -1).T  # (rows, terms of the first)
    size = 5.0, 1.1 + 0.28 * len(rows)
    numbers = np.vectorize("{:.1f}".format)(table)
    figure, axes = _draw_heat_map(size, table, table.max(), rows, first.terms, numbers, "effective examples", theme)
    axes.set_title("How many examples of the fit informed each rule", fontsize=9, color=theme.ink)
    axes.set_xlabel(_title(first.name))
    axes.set_ylabel(", ".join(_title(variable.name) for variable in others))
    return figure


def draw_layer_skips(rates: Mapping[str, Sequence[float]], theme: Theme = LIGHT) -> Figure:
    """Draw how often each layer is skipped, by question type.

    Args:
        rates: Skip rate in [0, 1] per layer, (L,), of each question type; equally many layers, at least one type.
        theme: Colours.
    """
    lengths = {len(row) for row in rates.values()}
    if len(lengths) != 1:
        raise ValueError(
            f"The skip rates have {sorted(lengths)} layers; one number of layers for all types is needed; evaluate all "
            "types with one model."
        )
    table = np.array(list(rates.values()))  # (types, L)
    num_layers = table.shape[1]
    has_numbers = num_layers <= MAX_ANNOTATED_LAYERS
    columns = [str(layer) if has_numbers or layer % 4 == 0 else "" for layer in range(num_layers)]
    numbers = np.vectorize(lambda rate: f"{100 * rate:.0f}" if has_numbers and rate >= 0.005 else "")(table)
    size, label = (7.0, 0.9 + 0.3 * len(table)), "share of questions that skip it"
    figure, axes = _draw_heat_map(size, table, 1.0, list(map(_title, rates)), columns, numbers, label, theme)
    axes.set_xlabel("decoder layer")
    return figure


def draw_accuracy(points: Sequence[SkipPoint], theme: Theme = LIGHT) -> Figure:
    """Draw accuracy against skip rate, a numbered point per run; the best dense run is the dashed line.

    At least one run is dense; their names stand below, in the order of the points.
    """
    figure = new_figure(6.0, 3.6 + 0.2 * len(points), theme)
    axes = figure.subplots()
    best = max(point.accuracy for point in points if point.is_dense)
    axes.axhline(100 * best, color=theme.second, linestyle="--", linewidth=1, zorder=1)
    for number, (point, side) in enumerate(zip(points, _sides(points), strict=True), 1):
        position = 100 * point.skip_rate, 100 * point.accuracy
        color, marker = (theme.second, "s") if point.is_dense else (theme.main, "o")
        label = f"{number}  {point.label}"
        axes.plot(*position, marker, color=color, label=label, markersize=7, zorder=3)
        if point.interval:
            lower, upper = point.interval
            axes.vlines(position[0], 100 * lower, 100 * upper, color=color, linewidth=1.5, zorder=2)
        offset: dict[str, Any] = {"xytext": (9 * side, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(str(number), position, ha="left" if side > 0 else "right", color=theme.ink, size=9, **offset)
    axes.set_xlabel("layers skipped on questions about images, %")
    axes.set_ylabel("accuracy on them, %")
    axes.margins(x=0.08, y=0.1)
    style_axes(axes, theme)
    axes.grid(color=theme.grid, linewidth=0.6)
    figure.legend(frameon=False, labelcolor=theme.ink, loc="outside lower left", fontsize=8)
    return figure


def draw_lines(series: Mapping[str, Sequence[tuple[float, float]]], theme: Theme = LIGHT) -> Figure:
    """Draw numbers over the steps of a run, a line per name.

    Args:
        series: Points (step, value) by name, each with a finite one; values that are not finite are left out.
        theme: Colours.
    """
    finite = {name: [point for point in points if np.isfinite(point[1])] for name, points in series.items()}
    if not finite or not all(finite.values()):
        raise ValueError(f"{len(series)} series cannot be drawn; each needs at least one finite point.")
    figure = new_figure(6.4, 2.2, theme)
    axes = figure.subplots()
    colors = [theme.main, theme.second, *theme.ordered(max(len(finite) - 2, 1))]
    for color, (name, points) in zip(colors, finite.items(), strict=False):
        # a single point is no line, so it gets a mark
        axes.plot(*zip(*points, strict=True), color=color, label=name, marker="o" if len(points) == 1 else None)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")
    style_axes(axes, theme)
    axes.grid(color=theme.grid, linewidth=0.6)
    figure.legend(frameon=False, labelcolor=theme.ink, loc="outside right upper", fontsize=8)
    return figure


def draw_bars(ratios: Mapping[str, float], theme: Theme = LIGHT) -> Figure:
    """Draw ratios of at least 0, by name, as horizontal bars in percent, in the order given.

    Raises:
        ValueError: If there is no value to draw.
    """
    if not ratios:
        raise ValueError("No bars to draw; give at least one value.")
    figure = new_figure(6.4, 0.5 + 0.22 * len(ratios), theme)
    axes = figure.subplots()
    percents = [100 * value for value in ratios.values()]
    bars = axes.barh([_title(name) for name in ratios], percents, color=theme.main)
    axes.bar_label(bars, labels=[f"{value:.3g} %" for value in percents], padding=3, color=theme.ink, size=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("%")
    style_axes(axes, theme)
    return figure


def render_svg(draw: Draw, theme: Theme = LIGHT) -> str:
    """Draw as SVG with text as outlines; the same figure gives the same text, on any machine up to rounding."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "fuzzyroe", "svg.fonttype": "path"}):
        draw(theme).savefig(buffer, format="svg", metadata={"Date": None})
    # matplotlib names clip paths after unrounded positions, whose last bits depend on the processor
    names: dict[str, str] = {}
    return re.sub(
        r"\bp[0-9a-f]{10}\b", lambda match: names.setdefault(match[0], f"clip{len(names)}"), buffer.getvalue()
    )


def render_png(draw: Draw, theme: Theme = LIGHT) -> bytes:
    """Draw as PNG at 150 dots per inch."""
    buffer = io.BytesIO()
    draw(theme).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _title(name: str) -> str:
    return name.replace("_", " ")


def _draw_variable(axes: Any, variable: LinguisticVariable, theme: Theme) -> None:
    lower, upper = variable.universe
    values = np.unique(np.concatenate([[lower, upper], variable.peaks]))
    memberships = variable.memberships(values)  # piecewise linear: corners are enough
    colors, heights = theme.ordered(len(variable.terms)), _label_heights(variable)
    for index, (term, peak, color) in enumerate(zip(variable.terms, variable.peaks, colors, strict=True)):
        axes.plot(values, memberships[:, index], color=color, linewidth=2)
        axes.fill_between(values, memberships[:, index], color=color, alpha=0.12)
        axes.text(peak, heights[index], term, ha="center", va="bottom", color=color, size=9)
    axes.set(xlim=(lower, upper), ylim=(0, max(heights) + 0.25), yticks=[0, 1], ylabel="membership")
    direction = {1: "the score rises with it", -1: "the score falls with it", 0: "direction unknown"}
    axes.set_xlabel(f"{_title(variable.name)} ({direction[variable.sign]})")
    style_axes(axes, theme)


def _label_heights(variable: LinguisticVariable) -> list[float]:
    """Where the names of terms stand; those of peaks close to each other take turns on two rows."""
    gap = 0.14 * (variable.universe[1] - variable.universe[0])
    heights = [1.05]
    for before, peak in zip(variable.peaks, variable.peaks[1:], strict=False):
        heights.append(1.25 if peak - before < gap and heights[-1] == 1.05 else 1.05)
    return heights


def _draw_curve(rule_base: FuzzyRuleBase, theme: Theme) -> Figure:
    variable = rule_base.antecedents[0]
    values = np.linspace(*variable.universe, GRID_POINTS)
    figure = new_figure(6.0, 3.1, theme)
    axes = figure.subplots()
    axes.plot(values, rule_base.evaluate(values[:, None]), color=theme.main, linewidth=2)
    labels = {"xlabel": _title(variable.name), "ylabel": _title(rule_base.consequent.name)}
    axes.set(**labels, ylim=rule_base.consequent.output_range)
    style_axes(axes, theme)
    return figure


def _draw_heat_map(
    size: tuple[float, float],
    table: np.ndarray,
    top: float,
    rows: Sequence[str],
    columns: Sequence[str],
    numbers: np.ndarray,
    label: str,
    theme: Theme,
) -> tuple[Figure, Any]:
    """Draw a table of values from 0 to ``top``, with texts in its cells."""
    figure = new_figure(*size, theme)
    axes = figure.subplots()
    image = axes.pcolormesh(table, cmap=theme.heat(), vmin=0, vmax=top, edgecolors=theme.grid, linewidth=0.4)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    style_axes(axes, theme)
    axes.tick_params(length=0)
    for (row, column), text in np.ndenumerate(numbers):
        color = theme.surface if table[row, column] > 0.65 * top else theme.ink
        if text:
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color, size=7)
    _colorbar(figure, image, [axes], label, theme)
    return figure, axes


def _sides(points: Sequence[SkipPoint]) -> list[int]:
    """On which side of each point its number stands, 1 right or -1 left: those above each other take turns."""
    sides = [1] * len(points)
    order = sorted(range(len(points)), key=lambda index: (round(points[index].skip_rate, 2), -points[index].accuracy))
    for before, after in zip(order, order[1:], strict=False):
        if round(points[before].skip_rate, 2) == round(points[after].skip_rate, 2):
            sides[after] = -sides[before]
    return sides


def _colorbar(figure: Figure, mappable: Any, panels: list[Any], label: str, theme: Theme) -> None:
    bar = figure.colorbar(mappable, ax=panels, ticks=MaxNLocator(5))
    bar.set_label(label, color=theme.ink, size=8)
    bar.ax.tick_params(colors=theme.ink, labelsize=8)
    bar.outline.set_edgecolor(theme.grid)
