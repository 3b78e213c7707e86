"""The closing report as files: one page that needs nothing else, its numbers as JSON, its figures as PNG."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

from llava.eval.figures import (
    DARK,
    LIGHT,
    Draw,
    SkipPoint,
    draw_accuracy,
    draw_control_surface,
    draw_layer_skips,
    draw_memberships,
    render_png,
    render_svg,
)
from llava.eval.report import Report, RunRow, to_json
from llava.eval.tables import Table, percent, points, report_tables

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2933; --quiet: #5b6773; --line: #d8dee4; --mark: #eef5fb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e3e8ee; --quiet: #9aa7b4; --line: #39424c; --mark: #1c2a37; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 44rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tr.mark td { background: var(--mark); }
figure { margin: .8rem 0; overflow-x: auto; }
img { max-width: 100%; min-width: 32rem; height: auto; display: block; }
"""


_READING_LAYERS = (
    "One row per question type, one column per decoder layer. A cell says how many of 100 questions of this type skip "
    "this layer. Rows with more colour are questions the router takes for easy; columns without colour are layers that "
    "this run never skips."
)


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report with its text.

    Attributes:
        name: Stem of its file.
        title: Heading.
        explanation: What it shows, in plain words.
        description: What a reader who cannot see it should know.
        draw: Gives the figure for a theme.
    """

    name: str
    title: str
    explanation: str
    description: str
    draw: Draw


def report_figures(report: Report) -> tuple[ReportFigure, ...]:
    """List the figures that the report has data for."""
    figures = [_accuracy_figure(report)]
    for number, run in enumerate((run for run in report.routed if run.layer_skip_rates), 1):
        figures.append(
            ReportFigure(
                f"layers_{number}",
                f"Which layers are skipped: {run.label}",
                _READING_LAYERS if number == 1 else "Read as above.",
                f"Skip rate of each decoder layer by question type for {run.label}.",
                partial(draw_layer_skips, run.layer_skip_rates),
            )
        )
    if report.rule_base is not None:
        figures += _rule_figures(report)
    return tuple(figures)


def render_page(report: Report, figures: tuple[ReportFigure, ...]) -> str:
    """Write the page; it loads nothing from anywhere.

    Args:
        report: The report.
        figures: From ``report_figures``.

    Returns:
        HTML.
    """
    runs, *others = report_tables(report)
    parts = [
        f"<h1>{escape(_headline(report))}</h1>",
        *(f"<p>{escape(sentence)}</p>" for sentence in _summary(report)),
        f"<h2>{escape(runs.title)}</h2>",
        _table(runs),
        f"<p class='quiet'>{escape(_reading_help(report))}</p>",
        *map(_figure, figures),
        *(f"<h2>{escape(table.title)}</h2>{_table(table)}" for table in others),
    ]
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>FuzzyRoE report</title><style>{_STYLE}</style>"
    )
    return f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"


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
    figures = report_figures(report)
    page, data = output / "report.html", output / "report.json"
    page.write_text(render_page(report, figures), encoding="utf-8")
    data.write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")
    pictures = [output / f"{figure.name}.png" for figure in figures]
    for picture, figure in zip(pictures, figures, strict=True):
        picture.write_bytes(render_png(figure.draw))
    return page, data, *pictures


def _headline(report: Report) -> str:
    if not report.routed:
        return "Dense runs"
    best = max((row for row in report.rows if not row.is_dense), key=lambda row: row.image_accuracy)
    return f"{percent(best.image_skip_rate)} of the layers skipped at {percent(best.image_accuracy)} accuracy"


def _summary(report: Report) -> list[str]:
    """What came out, in a sentence per run."""
    reference = report.reference
    sentences = [
        f"On the {len(reference.correct):,} questions about images, the dense run '{reference.label}', which runs "
        f"every layer, is right in {percent(reference.image_accuracy)} of the cases."
    ]
    return sentences + [_sentence(row) for row in report.rows if not row.is_dense]


def _sentence(row: RunRow) -> str:
    difference = row.difference
    if difference.lower > 0:
        verdict = "more than the dense run"
    elif difference.upper < 0:
        verdict = "less than the dense run"
    else:
        verdict = "no clear difference to the dense run"
    timing = f" A prefill takes {row.prefill_ratio:.2f} of the dense time." if row.prefill_ratio else ""
    return (
        f"'{row.label}' skips {percent(row.image_skip_rate)} of the layers on them and is right in "
        f"{percent(row.image_accuracy)}: {points(difference)} points, {verdict}.{timing}"
    )


def _reading_help(report: Report) -> str:
    return (
        f"The reference is the better of the dense runs, '{report.reference.label}'. Differences are in percentage "
        "points, question by question on the same questions about images, with 95 % intervals (normal on paired "
        "differences, half a question added to each cell). Skip rates are shares of decoder layers. Times of different "
        "batch sizes are not compared."
    )


def _accuracy_figure(report: Report) -> ReportFigure:
    marks = [
        SkipPoint(row.label, row.image_skip_rate, row.image_accuracy, row.is_dense, _whiskers(report, row))
        for row in report.rows
    ]
    return ReportFigure(
        "accuracy",
        "Accuracy against skipped layers",
        "Each point is a run. Further right, more layers are skipped; further up, more questions are answered "
        "correctly. The dashed line is the best dense run. A whisker is the 95 % interval of the difference to it: "
        "where it crosses the dashed line, the two cannot be told apart on these questions.",
        "Accuracy on questions about images against the share of layers skipped, a point per run.",
        partial(draw_accuracy, marks),
    )


def _whiskers(report: Report, row: RunRow) -> tuple[float, float] | None:
    if row.difference is None:
        return None
    base = report.reference.image_accuracy
    return max(0.0, base + row.difference.lower), min(1.0, base + row.difference.upper)


def _rule_figures(report: Report) -> list[ReportFigure]:
    memberships = ReportFigure(
        "memberships",
        "What the words mean",
        "The rules speak of low, medium and high. The curves say how far a value is each of these, from 0 (not at all) "
        "to 1 (fully); between two peaks it is a little of both. Peaks were placed so that each word covers about a "
        "third of the calibration questions.",
        "Membership functions of every antecedent of the fitted rule base.",
        partial(draw_memberships, report.rule_base),
    )
    surface = ReportFigure(
        "control_surface",
        "What the rules conclude",
        "The score the rules give to a question, for every combination of the features. A higher score means that a "
        "question keeps more layers.",
        "Output of the fitted rule base over its first two antecedents.",
        partial(draw_control_surface, report.rule_base),
    )
    return [memberships, surface] if report.rule_base.is_complete else [memberships]


def _figure(figure: ReportFigure) -> str:
    """A heading, a text and the picture in both themes."""
    light, dark = (_data_uri(render_svg(figure.draw, theme)) for theme in (LIGHT, DARK))
    return (
        f"<h2>{escape(figure.title)}</h2><p>{escape(figure.explanation)}</p>"
        f"<figure><picture><source media='(prefers-color-scheme: dark)' srcset='{dark}'>"
        f"<img src='{light}' alt='{escape(figure.description, quote=True)}'></picture></figure>"
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(
        f"<tr{' class=mark' if index in table.highlighted else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(table.rows)
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
