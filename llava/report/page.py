"""Pages of a closing report and of a stage: one self-contained HTML file each, with figures for light and dark."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from fuzzyroe.plots import (
    DARK,
    LIGHT,
    Draw,
    SkipPoint,
    draw_accuracy,
    draw_bars,
    draw_control_surface,
    draw_layer_skips,
    draw_lines,
    draw_memberships,
    render_png,
    render_svg,
)
from llava.files import atomic_write, write_json
from llava.report.comparison import Report, RunRow, Table, percent, points, report_tables, to_json

REPORT_FILE = "report.html"

MAX_POINTS = 400
"""Points of a line: longer runs are drawn as means over equal stretches."""

_READING_LAYERS = (
    "One row per question type, one column per decoder layer. A cell says how many of 100 questions of this type skip "
    "this layer. Rows with more colour are questions the router takes for easy; columns without colour are layers that "
    "this run never skips."
)

LINES = (
    ("Loss", "Value that is minimised, and the parts of RoE's objective.", {
        "loss": "loss", "routing/task_loss": "answers", "routing/hinge": "hinge",
    }),
    ("Skip rate", "Share of the layers that samples left out, a mean over turns and layers.", {
        "routing/skip_rate": "skipped",
    }),
    ("Keep weights", "Their mean, and their entropy in nats: 0 where every decision is hard.", {
        "routing/keep_weight_mean": "mean", "routing/keep_weight_entropy": "entropy",
    }),
    ("Gradient norm", "Before clipping.", {"grad_norm": "norm"}),
    ("Learning rate", "Rate of the first group of parameters.", {"learning_rate": "rate"}),
    ("Throughput", "Tokens per second over all processes.", {"throughput/tokens_per_second": "tokens/s"}),
)  # fmt: skip
"""Title, caption and lines of each chart of a stage over its steps."""

BARS = (
    ("Skip rate by layer", "Mean over the run.", "routing/skip_rate/layer_"),
    ("Skip rate by source", "Mean over the logged steps that had such samples.", "routing/skip_rate/source_"),
    ("Firing of rules", "Mean firing strength over the run, in the order of the rule table.", "routing/fuzzy/rule_"),
)
"""Title, caption and prefix of each chart of means."""


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a page.

    Attributes:
        name: Stem of its file.
        description: Text for readers who cannot see it.
        draw: Gives the figure for a theme.
    """

    name: str
    description: str
    draw: Draw


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a text in plain words, and a table or a figure."""

    title: str
    text: str = ""
    table: Table | None = None
    figure: ReportFigure | None = None

    @property
    def light(self) -> str:
        """The figure for a light page, as an address that holds it."""
        return self._embed(LIGHT)

    @property
    def dark(self) -> str:
        """The figure for a dark page, as an address that holds it."""
        return self._embed(DARK)

    def _embed(self, theme: Any) -> str:
        assert self.figure is not None
        svg = render_svg(self.figure.draw, theme)
        return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def render_page(title: str, headline: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """Write a page; it loads nothing from anywhere.

    Args:
        title: Title of the window.
        headline: The one thing to take away.
        summary: Sentences below it.
        sections: The rest, in order.

    Returns:
        HTML; every text is escaped.
    """
    environment = Environment(
        loader=PackageLoader("llava.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, headline=headline, summary=summary, sections=sections)


def write_report(report: Report, output: str | Path) -> tuple[Path, ...]:
    """Write ``report.html``, ``report.json`` and a PNG per figure.

    Args:
        report: The report.
        output: Folder, made if needed; files of an earlier report are replaced.

    Returns:
        The files, ``report.html`` first.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    figures = report_sections(report)
    runs, *others = report_tables(report)
    sections = [
        Section(runs.title, _reading_help(report), runs),
        *figures,
        *(Section(table.title, table=table) for table in others),
    ]
    page, data = output / REPORT_FILE, output / "report.json"
    with atomic_write(page) as unfinished:
        text = render_page("FuzzyRoE report", _headline(report), _summary(report), sections)
        unfinished.write_text(text, encoding="utf-8")
    write_json(data, to_json(report))
    pictures = []
    for figure in (section.figure for section in figures if section.figure is not None):
        picture = output / f"{figure.name}.png"
        with atomic_write(picture) as unfinished:
            unfinished.write_bytes(render_png(figure.draw))
        pictures.append(picture)
    return page, data, *pictures


def report_sections(report: Report) -> tuple[Section, ...]:
    """List the figures that the report has data for, each with its text."""
    sections = [_accuracy_section(report)]
    layers = [(row.run.label, row.run.skip_rate.get("layers_by_type")) for row in report.routed]
    for number, (label, rates) in enumerate(((label, rates) for label, rates in layers if rates), 1):
        text = _READING_LAYERS if number == 1 else "Read as above."
        description = f"Skip rate of each decoder layer by question type for {label}."
        figure = ReportFigure(f"layers_{number}", description, partial(draw_layer_skips, rates))
        sections.append(Section(f"Which layers are skipped: {label}", text, figure=figure))
    if report.rule_base is not None:
        description = "Membership functions of every antecedent of the fitted rule base."
        memberships = ReportFigure("memberships", description, partial(draw_memberships, report.rule_base))
        sections.append(
            Section(
                "What the words mean",
                "The rules speak of low, medium and high. The curves say how far a value is each of these, from 0 (not "
                "at all) to 1 (fully); between two peaks it is a little of both. Peaks were placed so that each word "
                "covers about a third of the calibration questions.",
                figure=memberships,
            )
        )
        if report.rule_base.is_complete:
            description = "Output of the fitted rule base over its first two antecedents."
            surface = ReportFigure("control_surface", description, partial(draw_control_surface, report.rule_base))
            sections.append(
                Section(
                    "What the rules conclude",
                    "The score the rules give to a question, for every combination of the features. A higher score "
                    "means that a question keeps more layers.",
                    figure=surface,
                )
            )
    return tuple(sections)


def write_stage_page(folder: Path) -> Path:
    """Write ``report.html`` beside the files it is made of.

    Args:
        folder: Output of a stage, with ``stage.json`` and, if the stage took steps, ``metrics.jsonl``.
    """
    summary = json.loads((folder / "stage.json").read_text())
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    page = folder / REPORT_FILE
    page.write_text(render_stage(summary, [line for line in lines if "loss" in line]), encoding="utf-8")
    return page


def render_stage(summary: dict[str, Any], steps: Sequence[dict[str, Any]]) -> str:
    """Write the page of a stage.

    Args:
        summary: Content of ``stage.json``.
        steps: Logged steps in order; none for a stage of forward passes only.
    """
    sections = [Section("Facts", table=_facts_table(_facts(summary)))]
    for title, caption, names in LINES:
        series = {label: thin_out(line) for name, label in names.items() if (line := _line(steps, name))}
        if series:
            figure = ReportFigure("", f"{title} over the steps.", partial(draw_lines, series))
            sections.append(Section(title, caption, figure=figure))
    for title, caption, prefix in BARS:
        means = _means(steps, prefix)
        if means:
            sections.append(Section(title, caption, figure=ReportFigure("", title, partial(draw_bars, means))))
    calibration = summary.get("calibration") or {}
    numbers = {name: value for name, value in calibration.items() if not isinstance(value, (list, dict))}
    if numbers:
        sections.append(Section("Calibration", table=_facts_table(numbers)))
    name, purpose = str(summary["stage"]), str(summary.get("purpose", ""))
    return render_page(f"Stage {name}", f"Stage {name}", [purpose] if purpose else [], sections)


def thin_out(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Give means over equal stretches, at most ``MAX_POINTS`` of them; each stands at its last step."""
    stretch = -(-len(line) // MAX_POINTS)
    parts = [line[start : start + stretch] for start in range(0, len(line), stretch)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _headline(report: Report) -> str:
    if not report.routed:
        return "Dense runs"
    best = max((row.run for row in report.routed), key=lambda run: run.image_accuracy)
    return f"{percent(best.image_skip_rate)} of the layers skipped at {percent(best.image_accuracy)} accuracy"


def _summary(report: Report) -> list[str]:
    """State the outcome, in a sentence per run."""
    reference = report.reference
    sentences = [
        f"On the {len(reference.correct):,} questions about images, the dense run '{reference.label}', which runs "
        f"every layer, is right in {percent(reference.image_accuracy)} of the cases."
    ]
    return sentences + [_sentence(row) for row in report.routed]


def _sentence(row: RunRow) -> str:
    difference, run = row.difference, row.run
    assert difference is not None  # a routed run is never the reference
    if difference.lower > 0:
        verdict = "more than the dense run"
    elif difference.upper < 0:
        verdict = "less than the dense run"
    else:
        verdict = "no clear difference to the dense run"
    timing = f" A prefill takes {row.prefill_ratio:.2f} of the dense time." if row.prefill_ratio else ""
    return (
        f"'{run.label}' skips {percent(run.image_skip_rate)} of the layers on them and is right in "
        f"{percent(run.image_accuracy)}: {points(difference)} points, {verdict}.{timing}"
    )


def _reading_help(report: Report) -> str:
    return (
        f"The reference is the better of the dense runs, '{report.reference.label}'. Differences are in percentage "
        "points, question by question on the same questions about images, with 95 % intervals (normal on paired "
        "differences, half a question added to each cell). Skip rates are shares of decoder layers. Times of different "
        "batch sizes are not compared."
    )


def _accuracy_section(report: Report) -> Section:
    base, marks = report.reference.image_accuracy, []
    for row in report.rows:
        run, difference = row.run, row.difference
        whiskers = None
        if difference is not None:
            whiskers = max(0.0, base + difference.lower), min(1.0, base + difference.upper)
        marks.append(SkipPoint(run.label, run.image_skip_rate, run.image_accuracy, run.is_dense, whiskers))
    figure = ReportFigure(
        "accuracy",
        "Accuracy on questions about images against the share of layers skipped, a point per run.",
        partial(draw_accuracy, marks),
    )
    return Section(
        "Accuracy against skipped layers",
        "Each point is a run. Further right, more layers are skipped; further up, more questions are answered "
        "correctly. The dashed line is the best dense run. A whisker is the 95 % interval of the difference to it: "
        "where it crosses the dashed line, the two cannot be distinguished on these questions.",
        figure=figure,
    )


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    facts = {name: value for name, value in summary.items() if not isinstance(value, (dict, list))}
    facts = {name: value for name, value in facts.items() if name not in ("stage", "purpose") and value is not None}
    moved = [part for part, has_moved in (summary.get("moved") or {}).items() if has_moved]
    return {**facts, "moved": ", ".join(moved)} if moved else facts


def _facts_table(values: dict[str, Any]) -> Table:
    written = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return Table("", (), tuple((name.replace("_", " "), text) for name, text in written.items()))


def _line(steps: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], float(line[name])) for line in steps if name in line]


def _means(steps: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    names = sorted({name for line in steps for name in line if name.startswith(prefix)})
    columns = {name.removeprefix(prefix): [line[name] for line in steps if name in line] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}
