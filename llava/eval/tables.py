"""The closing tables as cells of text, ready for a terminal or a page."""

from __future__ import annotations

from dataclasses import dataclass

from llava.eval.evaluation_file import Evaluation
from llava.eval.report import Report, RunRow
from llava.eval.statistics import PairedDifference

NOT_MEASURED = "–"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: Its title.
        columns: Headings; the first column is text, the others are numbers.
        rows: Cells, one list per row.
        highlighted: Rows to set apart.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    highlighted: frozenset[int] = frozenset()


def runs_table(report: Report) -> Table:
    """Skip rate, accuracy and time of every run."""
    columns = (
        "run",
        "target skip",
        "skip, all",
        "skip, image",
        "accuracy, image",
        "difference [95 % interval]",
        "prefill ms",
        "decode ms/token",
        "prefill / dense",
    )
    rows = tuple(_run_cells(row) for row in report.rows)
    is_reference = frozenset(index for index, row in enumerate(report.rows) if row.is_reference)
    return Table("Accuracy and time against the dense model", columns, rows, is_reference)


def types_table(report: Report) -> Table:
    """Accuracy and skip rate per question type, a column per run."""
    names = dict.fromkeys(name for run in report.evaluations for name in run.accuracy_by_type)
    rows = tuple(
        (name, *(_group_cell(run, run.accuracy_by_type, run.skip_rate_by_type, name) for run in report.evaluations))
        for name in names
    )
    return Table("Accuracy (skip rate) by question type", ("question type", *_labels(report)), rows)


def complexity_table(report: Report) -> Table:
    """Accuracy and skip rate per complexity of questions about images, a column per run."""
    levels = sorted({level for run in report.evaluations for level in run.accuracy_by_complexity})
    rows = tuple(
        (
            level,
            *(
                _group_cell(run, run.accuracy_by_complexity, run.skip_rate_by_complexity, level)
                for run in report.evaluations
            ),
        )
        for level in levels
    )
    return Table("Accuracy (skip rate) by complexity of the question", ("complexity", *_labels(report)), rows)


def stages_table(report: Report) -> Table:
    """Time, steps and engine of every stage."""
    columns = ("stage", "time", "steps", "samples", "engine", "ZeRO stage", "world size")
    rows = tuple(
        (
            stage.stage,
            duration(stage.seconds),
            count(stage.steps),
            count(stage.samples),
            stage.engine or NOT_MEASURED,
            count(stage.zero_stage),
            count(stage.world_size),
        )
        for stage in report.stages
    )
    return Table("Stages", columns, rows)


def report_tables(report: Report) -> tuple[Table, ...]:
    """The closing tables that have a row."""
    tables = (runs_table(report), types_table(report), complexity_table(report), stages_table(report))
    return tuple(table for table in tables if table.rows)


def percent(ratio: float | None) -> str:
    """A ratio in percent, such as ``31.4 %``."""
    return NOT_MEASURED if ratio is None else f"{100 * ratio:.1f} %"


def points(difference: PairedDifference) -> str:
    """A difference of accuracies in percentage points with its interval, such as ``-0.8 [-1.9, +0.3]``."""
    middle, lower, upper = (100 * value for value in (difference.difference, difference.lower, difference.upper))
    return f"{middle:+.1f} [{lower:+.1f}, {upper:+.1f}]"


def count(number: int | None) -> str:
    """A whole number with thousands separators."""
    return NOT_MEASURED if number is None else f"{number:,}"


def milliseconds(number: float | None) -> str:
    """Milliseconds, with two decimals below 10 and one above."""
    return NOT_MEASURED if number is None else f"{number:.{1 if number >= 10 else 2}f}"


def duration(seconds: float | None) -> str:
    """A time such as ``45 s``, ``12 min 05 s`` or ``3 h 20 min``."""
    if seconds is None:
        return NOT_MEASURED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _run_cells(row: RunRow) -> tuple[str, ...]:
    return (
        row.label,
        "dense" if row.is_dense else percent(row.target_skip_rate),
        percent(row.skip_rate),
        percent(row.image_skip_rate),
        percent(row.image_accuracy),
        "reference" if row.difference is None else points(row.difference),
        milliseconds(row.prefill_ms),
        milliseconds(row.decode_ms),
        NOT_MEASURED if row.prefill_ratio is None else f"{row.prefill_ratio:.2f}",
    )


def _labels(report: Report) -> tuple[str, ...]:
    return tuple(run.label for run in report.evaluations)


def _group_cell(run: Evaluation, accuracies: dict[str, float], skip_rates: dict[str, float], name: str) -> str:
    accuracy = percent(accuracies.get(name))
    return accuracy if run.is_dense or name not in skip_rates else f"{accuracy} ({percent(skip_rates[name])})"
