"""Comparison of runs on the same questions: paired differences, the closing report, its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.yaml_io import load_rule_base
from llava.report.evaluation import Evaluation, load_evaluation, read_json

NORMAL_QUANTILE = NormalDist().inv_cdf(0.975)
"""For two-sided 95 % intervals."""

RULE_BASE_FILE = "rule_base.yaml"

STAGE_FACTS = ("stage", "purpose", "samples", "steps", "seconds", "engine", "zero_stage", "world_size", "calibration")
"""What a report takes from the ``stage.json`` of a stage."""

NOT_MEASURED = "–"


@dataclass(frozen=True)
class PairedDifference:
    """How much more often a run is right than a reference, on the same questions."""

    difference: float  # accuracy of the run minus accuracy of the reference, in [-1, 1]
    lower: float  # 95 % confidence interval of the difference
    upper: float
    num_items: int  # questions, n
    num_gained: int  # questions the run gets right, the reference wrong
    num_lost: int  # questions the run gets wrong, the reference right


def paired_difference(
    reference: Mapping[str, int], run: Mapping[str, int], names: tuple[str, str] = ("the reference", "the run")
) -> PairedDifference:
    """Compare a run with a reference, question by question.

    The difference is ``(gained - lost) / n``. Its interval is the normal one on the paired differences after adding
    half a question to each cell of the 2 x 2 table (right or wrong, by run): with ``b = gained + 1/2``,
    ``c = lost + 1/2`` and ``m = n + 2`` it is ``(b - c) / m ± 1.96 sqrt(b + c - (b - c)^2 / m) / m``, clipped to
    [-1, 1]. The added halves keep it from collapsing where two runs answer all questions alike. Questions are taken as
    independent; the choice of a reference among several runs is not corrected for.

    Args:
        reference, run: 1 (right) or 0 (wrong) per question, on the same questions.
        names: What the messages call the two.

    Raises:
        ValueError: If there is no question, the questions differ, or a value is neither 0 nor 1.

    Reference:
        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 24(5), 2005.

    >>> found = paired_difference({"a": 1, "b": 0, "c": 1}, {"a": 1, "b": 1, "c": 0})
    >>> found.difference, found.num_gained, found.num_lost
    (0.0, 1, 1)
    """
    first, second = names
    if not reference and not run:
        raise ValueError(
            f"Neither {first} nor {second} has a question to pair; at least one is needed; check 'correct'."
        )
    for answers, others, name, other in ((reference, run, first, second), (run, reference, second, first)):
        missing = [key for key in answers if key not in others]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(answers)} questions of {name} are not in {other}, the first is "
                f"'{missing[0]}'; a paired comparison needs the same questions in both. Evaluate both on the same file."
            )
    for role, answers in {"reference": reference, "run": run}.items():
        strange = [f"{value!r} for '{key}'" for key, value in answers.items() if value not in (0, 1)]
        if strange:
            raise ValueError(f"The {role} has {strange[0]}; 0 (wrong) and 1 (right) are allowed; correct the file.")
    gained = sum(run[key] > value for key, value in reference.items())
    lost = sum(run[key] < value for key, value in reference.items())
    total = len(reference) + 2  # half a question in each of four cells
    centre = (gained - lost) / total
    spread = gained + lost + 1 - (gained - lost) ** 2 / total
    margin = NORMAL_QUANTILE * math.sqrt(spread) / total
    lower, upper = max(-1.0, centre - margin), min(1.0, centre + margin)
    return PairedDifference((gained - lost) / len(reference), lower, upper, len(reference), gained, lost)


@dataclass(frozen=True)
class RunRow:
    """One run beside the reference."""

    run: Evaluation
    difference: PairedDifference | None  # of the accuracy on images; None for the reference itself
    prefill_ratio: float | None  # to the reference's time; None unless both were timed at the same batch size

    @property
    def is_reference(self) -> bool:
        """Whether the others are compared with it."""
        return self.difference is None


@dataclass(frozen=True)
class Report:
    """Data of the closing tables and figures."""

    reference: Evaluation  # the dense run with the best accuracy on questions about an image
    rows: tuple[RunRow, ...]  # dense runs first, then by growing target skip ratio
    stages: tuple[dict[str, Any], ...] = ()  # STAGE_FACTS, folder and rule_base of each; None where it has no such fact
    rule_base: FuzzyRuleBase | None = None  # of the last stage that has one

    @property
    def routed(self) -> tuple[RunRow, ...]:
        """The runs that skip layers."""
        return tuple(row for row in self.rows if not row.run.is_dense)


def load_report(evaluation_files: Sequence[str | Path], stage_folders: Sequence[str | Path] = ()) -> Report:
    """Read result files and stage folders, and compare the runs with the best dense one, question by question.

    Raises:
        ValueError: If a file breaks its schema, there is no dense run, two runs share a label, or runs answered
            different questions.
        OSError: If a file cannot be read.
    """
    stages = tuple(_load_stage(Path(folder)) for folder in stage_folders)
    runs = [load_evaluation(path) for path in evaluation_files]
    labels = [run.label for run in runs]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"The label '{twice[0]}' names {labels.count(twice[0])} runs; one each is allowed. Rename one."
        )
    dense = [run for run in runs if run.is_dense]
    if not dense:
        raise ValueError(
            f"None of the {len(runs)} runs is dense; at least one is needed to compare with (its target_skip_ratio is "
            "null). Evaluate the base model, or the checkpoint with routing off."
        )
    reference = max(dense, key=lambda run: run.image_accuracy)
    routed = sorted((run for run in runs if not run.is_dense), key=lambda run: run.target_skip_ratio or 0.0)
    rows = []
    for run in (*dense, *routed):
        names = str(reference.path), str(run.path)
        difference = None if run is reference else paired_difference(reference.correct, run.correct, names)
        ratio = None
        # the time of a prompt depends on how many share its batch
        if run.prefill_ms is not None and reference.prefill_ms and run.batch_size == reference.batch_size:
            ratio = run.prefill_ms / reference.prefill_ms
        rows.append(RunRow(run, difference, ratio))
    rule_bases = [stage["rule_base"] for stage in stages if stage["rule_base"]]
    return Report(reference, tuple(rows), stages, load_rule_base(rule_bases[-1]) if rule_bases else None)


def _load_stage(folder: Path) -> dict[str, Any]:
    """Read the facts in a stage's output folder."""
    content = read_json(folder / "stage.json")
    if "stage" not in content:
        raise ValueError(
            f"{folder / 'stage.json'} does not name its 'stage'; the summary of a finished stage is needed. Pass the "
            "output folder of a stage."
        )
    rule_base = folder / RULE_BASE_FILE
    facts = {name: content.get(name) for name in STAGE_FACTS}
    return {"folder": str(folder), "rule_base": str(rule_base) if rule_base.is_file() else None, **facts}


def to_json(report: Report) -> dict[str, Any]:
    """Give the report as plain data, without the single answers."""
    runs = []
    for row in report.rows:
        facts = {name: value for name, value in asdict(row.run).items() if name not in ("path", "correct")}
        difference = None if row.difference is None else asdict(row.difference)
        compared = {"is_reference": row.is_reference, "difference": difference, "prefill_ratio": row.prefill_ratio}
        runs.append({**facts, **compared})
    return {"reference": report.reference.label, "runs": runs, "stages": list(report.stages)}


@dataclass(frozen=True)
class Table:
    """A table of text, for a terminal or a page."""

    title: str
    columns: tuple[str, ...]  # the first column is text, the others are numbers
    rows: tuple[tuple[str, ...], ...]
    highlighted: frozenset[int] = frozenset()  # rows to set apart


def runs_table(report: Report) -> Table:
    """Skip rate, accuracy and time of every run."""
    columns = (
        *("run", "target skip", "skip, all", "skip, image", "accuracy, image", "difference [95 % interval]"),
        *("prefill ms", "decode ms/token", "prefill / dense"),
    )
    rows = tuple(
        (
            row.run.label,
            "dense" if row.run.is_dense else percent(row.run.target_skip_ratio),
            percent(row.run.skip_rate.get("all") or 0.0),
            percent(row.run.image_skip_rate),
            percent(row.run.image_accuracy),
            "reference" if row.difference is None else points(row.difference),
            milliseconds(row.run.prefill_ms),
            milliseconds(row.run.decode_ms_per_token),
            NOT_MEASURED if row.prefill_ratio is None else f"{row.prefill_ratio:.2f}",
        )
        for row in report.rows
    )
    is_reference = frozenset(index for index, row in enumerate(report.rows) if row.is_reference)
    return Table("Accuracy and time against the dense model", columns, rows, is_reference)


def types_table(report: Report) -> Table:
    """Accuracy and skip rate per question type, a column per run."""

    def read(run: Evaluation) -> Groups:
        skip_rates = run.skip_rate.get("types", {})
        return {name: (ratio, skip_rates.get(name)) for name, ratio in run.accuracy.get("types", {}).items()}

    return _group_table(report, "Accuracy (skip rate) by question type", "question type", read)


def complexity_table(report: Report) -> Table:
    """Accuracy and skip rate per complexity of questions about images, a column per run."""

    def read(run: Evaluation) -> Groups:
        return {name: (level.get("accuracy"), level.get("skip_rate")) for name, level in run.complexity.items()}

    return _group_table(report, "Accuracy (skip rate) by complexity of the question", "complexity", read)


Groups = dict[str, tuple[float | None, float | None]]
"""Accuracy and skip rate of groups of questions, by name."""


def _group_table(report: Report, title: str, heading: str, read: Callable[[Evaluation], Groups]) -> Table:
    """Lay out the groups of every run, a row each."""
    runs = [(row.run, read(row.run)) for row in report.rows]
    rows = []
    for name in sorted({name for _, groups in runs for name in groups}):
        cells = [name]
        for run, groups in runs:
            accuracy, skip_rate = groups.get(name, (None, None))
            is_plain = run.is_dense or skip_rate is None
            cells.append(percent(accuracy) if is_plain else f"{percent(accuracy)} ({percent(skip_rate)})")
        rows.append(tuple(cells))
    return Table(title, (heading, *(run.label for run, _ in runs)), tuple(rows))


def stages_table(report: Report) -> Table:
    """Time, steps and engine of every stage."""
    columns = ("stage", "time", "steps", "samples", "engine", "ZeRO stage", "world size")
    rows = []
    for stage in report.stages:
        names = ("steps", "samples", "zero_stage", "world_size")
        counts = [NOT_MEASURED if stage[name] is None else f"{stage[name]:,}" for name in names]
        engine = stage["engine"] or NOT_MEASURED
        rows.append((stage["stage"], duration(stage["seconds"]), *counts[:2], engine, *counts[2:]))
    return Table("Stages", columns, tuple(rows))


def report_tables(report: Report) -> tuple[Table, ...]:
    """Give the closing tables that have a row."""
    tables = (runs_table(report), types_table(report), complexity_table(report), stages_table(report))
    return tuple(table for table in tables if table.rows)


def percent(ratio: float | None) -> str:
    """Write a ratio in percent, such as ``31.4 %``."""
    return NOT_MEASURED if ratio is None else f"{100 * ratio:.1f} %"


def points(difference: PairedDifference) -> str:
    """Write a difference of accuracies in percentage points with its interval, such as ``-0.8 [-1.9, +0.3]``."""
    middle, lower, upper = (100 * value for value in (difference.difference, difference.lower, difference.upper))
    return f"{middle:+.1f} [{lower:+.1f}, {upper:+.1f}]"


def milliseconds(number: float | None) -> str:
    """Write milliseconds, with two decimals below 10 and one above."""
    return NOT_MEASURED if number is None else f"{number:.{1 if number >= 10 else 2}f}"


def duration(seconds: float | None) -> str:
    """Write a time such as ``45 s``, ``12 min 05 s`` or ``3 h 20 min``."""
    if seconds is None:
        return NOT_MEASURED
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
