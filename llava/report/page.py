"""Pages of a closing report and of a stage: one self-contained HTML file each, with figures for light and dark.

The words stand in the templates beside this file; here is what they are given.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader

from fuzzyroe import plots
from llava.files import atomic_write, write_json
from llava.report.comparison import Report, percent, points, report_tables, to_json

REPORT_FILE = "report.html"

MAX_POINTS = 400
"""Points of a line: longer runs are drawn as means over equal stretches."""


def render_page(template: str, **content: Any) -> str:
    """Fill a template in this folder; the page loads nothing from anywhere, and every text in it is escaped."""
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("llava.report", "."), **options)
    themes = {"light": partial(_embed, theme=plots.LIGHT), "dark": partial(_embed, theme=plots.DARK)}
    environment.filters |= {"percent": percent, "points": points, **themes}
    return environment.get_template(template).render(content)


def _embed(draw: plots.Draw, theme: plots.Theme) -> str:
    """Give the address that holds a figure."""
    svg = plots.render_svg(draw, theme)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def write_report(report: Report, output: str | Path) -> tuple[Path, ...]:
    """Write ``report.html``, ``report.json`` and a PNG per figure into a folder; give them in this order."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    figures, tables = report_figures(report), report_tables(report)
    page, data = output / REPORT_FILE, output / "report.json"
    with atomic_write(page) as unfinished:
        text = render_page("report.html.jinja", report=report, figures=figures, tables=tables)
        unfinished.write_text(text, encoding="utf-8")
    write_json(data, to_json(report))
    pictures = {output / f"{name}.png": draw for name, draw in figures.items()}
    for picture, draw in pictures.items():
        with atomic_write(picture) as unfinished:
            unfinished.write_bytes(plots.render_png(draw))
    return page, data, *pictures


def report_figures(report: Report) -> dict[str, plots.Draw]:
    """Give the figures that the report has data for, by the stem of their file."""
    base, marks = report.reference.image_accuracy, []
    for row in report.rows:
        run, difference = row.run, row.difference
        whiskers = None
        if difference is not None:
            whiskers = max(0.0, base + difference.lower), min(1.0, base + difference.upper)
        marks.append(plots.SkipPoint(run.label, run.image_skip_rate, run.image_accuracy, run.is_dense, whiskers))
    figures: dict[str, plots.Draw] = {"accuracy": partial(plots.draw_accuracy, marks)}
    layers = [row.run.skip_rate.get("layers_by_type") for row in report.routed]
    for number, rates in enumerate(filter(None, layers), 1):
        figures[f"layers_{number}"] = partial(plots.draw_layer_skips, rates)
    if report.rule_base is not None:
        figures["memberships"] = partial(plots.draw_memberships, report.rule_base)
        if report.rule_base.is_complete:  # a surface needs a conclusion everywhere
            figures["control_surface"] = partial(plots.draw_control_surface, report.rule_base)
    return figures


def write_stage_page(folder: Path) -> Path:
    """Write ``report.html`` beside a stage's ``stage.json`` and, if it took steps, ``metrics.jsonl``."""
    summary = json.loads((folder / "stage.json").read_text())
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    page = folder / REPORT_FILE
    page.write_text(render_stage(summary, [line for line in lines if "loss" in line]), encoding="utf-8")
    return page


def render_stage(summary: dict[str, Any], steps: Sequence[dict[str, Any]]) -> str:
    """Write the page of a stage from its ``stage.json`` and its logged steps in order, if it took any."""

    def draw_steps(names: dict[str, str]) -> plots.Draw | None:
        """Lines over the steps, by the name that was logged and the one to show."""
        lines = {name: [(line["step"], float(line[name])) for line in steps if name in line] for name in names}
        series = {names[name]: thin_out(line) for name, line in lines.items() if line}
        return partial(plots.draw_lines, series) if series else None

    def draw_means(prefix: str) -> plots.Draw | None:
        """Bars of what was logged under a prefix."""
        logged = sorted({name for line in steps for name in line if name.startswith(prefix)})
        values = {name.removeprefix(prefix): [line[name] for line in steps if name in line] for name in logged}
        return partial(plots.draw_bars, {name: fmean(row) for name, row in values.items()}) if values else None

    facts = {name: value for name, value in summary.items() if name not in ("stage", "purpose")}
    moved = [part for part, has_moved in (summary.get("moved") or {}).items() if has_moved]
    tables = {
        "Facts": _write_numbers({**facts, "moved": ", ".join(moved) or None}),
        "Calibration": _write_numbers(summary.get("calibration") or {}),
    }
    return render_page("stage.html.jinja", summary=summary, tables=tables, draw_steps=draw_steps, draw_means=draw_means)


def thin_out(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give means over equal stretches, at most ``MAX_POINTS`` of them; each stands at its last step."""
    stretch = -(-len(line) // MAX_POINTS)
    parts = [line[start : start + stretch] for start in range(0, len(line), stretch)]
    return [(part[-1][0], fmean(value for _, value in part)) for part in parts]


def _write_numbers(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of names and values; what is absent, a list or an object is left out."""
    plain = {name: value for name, value in values.items() if not isinstance(value, list | dict | None)}
    texts = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in plain.items()}
    return [(name.replace("_", " "), text) for name, text in texts.items()]
