"""Charts as inline SVG that follow the page's colours, drawn without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 112, 12, 28
COLOURS = ("var(--first)", "var(--second)", "var(--third)", "var(--quiet)")
BAR = 18

Series = Sequence[tuple[float, float]]
"""Points (step, value)."""


def line_chart(series: Mapping[str, Series]) -> str:
    """Lines over steps, each named at its last point.

    Args:
        series: At most four, by name, of at least one finite point each.

    Raises:
        ValueError: If there is nothing to draw, or more than four lines.
    """
    series = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    if not series or len(series) > len(COLOURS) or not all(series.values()):
        raise ValueError(f"{len(series)} series cannot be drawn; one to {len(COLOURS)} with finite points can.")
    steps = [x for points in series.values() for x, _ in points]
    ticks = nice_ticks([y for points in series.values() for _, y in points])
    low_x, high_x = min(steps), max(max(steps), min(steps) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        y = place(low_x, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step, anchor in ((low_x, "start"), (high_x, "end")):
        x = place(step, ticks[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">step {step:g}</text>')
    taken: list[float] = []
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        placed = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(placed) == 1:
            parts.append(f'<circle cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="3" fill="{colour}"/>')
        x, y = placed[-1]
        while any(abs(y - other) < 14 for other in taken):
            y += 14
        taken.append(y)
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" style="fill: {colour}">{escape(name)}</text>')
    return _svg(HEIGHT, parts)


def bar_chart(values: Mapping[str, float], scale: float = 100.0, unit: str = "%") -> str:
    """Horizontal bars, one per name, in the order given.

    Args:
        values: At least one, none below 0.
        scale: What values are multiplied by to be shown.
        unit: What is written behind a value.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("No bars to draw; give at least one value.")
    largest = max(max(values.values()), 1e-12)
    parts = []
    for row, (name, value) in enumerate(values.items()):
        y, length = row * BAR, max(value, 0) / largest * (WIDTH - 2 * RIGHT - 60)
        parts.append(f'<text x="{RIGHT + 20}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        bar = f'y="{y + 3}" width="{length:.1f}" height="{BAR - 6}" fill="var(--first)"'
        parts.append(f'<rect x="{RIGHT + 28}" {bar}/>')
        parts.append(f'<text x="{RIGHT + 34 + length:.1f}" y="{y + 13}">{value * scale:.3g} {unit}</text>')
    return _svg(len(values) * BAR + 4, parts)


def nice_ticks(values: Sequence[float], number: int = 4) -> list[float]:
    """Round numbers around some values, from at or below the least to at or above the greatest, at least two."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / number))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= number)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _svg(height: int, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
