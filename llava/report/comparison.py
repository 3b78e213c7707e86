"""Comparison of runs on the same questions: paired differences, the closing report, its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.yaml_io import load_rule_base
from llava.report.evaluation import Evaluation, load_evaluation, read_json

NORMAL_QUANTILE = NormalDist().inv_cdf(0.975)
"""For two-sided 95 % intervals."""

RULE_BASE_FILE = "rule_base.yaml"

NOT_MEASURED = "–"


@dataclass(frozen=True)
class PairedDifference:
    """How much more often a run is right than a reference, on the same questions.

    Attributes:
        difference: Accuracy of the run minus accuracy of the reference, in [-1, 1].
        lower, upper: 95 % confidence interval of the difference.
        num_items: Questions, n.
        num_gained: Questions the run gets right, the reference wrong.
        num_lost: Questions the run gets wrong, the reference right.
    """

    difference: float
    lower: float
    upper: float
    num_items: int
    num_gained: int
    num_lost: int


def paired_difference(reference: Mapping[str, int], run: Mapping[str, int]) -> PairedDifference:
    """Compare a run with a reference, question by question.

    The difference is ``(gained - lost) / n``. Its interval is the normal one on the paired differences after adding
    half a question to each cell of the 2 x 2 table (right or wrong, by run): with ``b = gained + 1/2``,
    ``c = lost + 1/2`` and ``m = n + 2`` it is ``(b - c) / m ± 1.96 sqrt(b + c - (b - c)^2 / m) / m``. The added halves
    keep the interval from collapsing to nothing when two runs answer all questions alike, and need no random numbers.
    Questions are taken as independent; the choice of a reference among several runs is not corrected for.

    Args:
        reference: 1 (right) or 0 (wrong) per question.
        run: The same for the other run, on the same questions.

    Returns:
        Difference and interval, clipped to [-1, 1].

    Raises:
        ValueError: If there is no question, the questions differ, or a value is neither 0 nor 1.

    Reference:
        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 24(5), 2005.

    >>> found = paired_difference({"a": 1, "b": 0, "c": 1}, {"a": 1, "b": 1, "c": 0})
    >>> found.difference, found.num_gained, found.num_lost
    (0.0, 1, 1)
    """
    check_same_questions(reference, run)
    for name, answers in {"reference": reference, "run": run}.items():
        strange = next((f"{value!r} for '{key}'" for key, value in answers.items() if value not in (0, 1)), None)
        if strange:
            raise ValueError(f"The {name} has {strange}; 0 (wrong) and 1 (right) are allowed; correct the file.")
    gained = sum(run[key] > value for key, value in reference.items())
    lost = sum(run[key] < value for key, value in reference.items())
    total = len(reference) + 2  # half a question in each of four cells
    centre = (gained - lost) / total
    spread = gained + lost + 1 - (gained - lost) ** 2 / total
    margin = NORMAL_QUANTILE * math.sqrt(spread) / total
    lower, upper = max(-1.0, centre - margin), min(1.0, centre + margin)
    return PairedDifference((gained - lost) / len(reference), lower, upper, len(reference), gained, lost)


def check_same_questions(
    reference: Mapping[str, int], run: Mapping[str, int], names: tuple[str, str] = ("", "")
) -> None:
    """Refuse to pair runs on different questions.

    Args:
        reference: Answers by question.
        run: Answers by question.
        names: Names of the two for the message.

    Raises:
        ValueError: If one has a question that the other lacks, or there is none.
    """
    first, second = (name or default for name, default in zip(names, ("the reference", "the run"), strict=True))
    if not reference and not run:
        raise ValueError(
            f"Neither {first} nor {second} has a question to pair; at least one is needed; check 'correct'."
        )
    for one, other, has, lacks in ((reference, run, first, second), (run, reference, second, first)):
        missing = [key for key in one if key not in other]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(one)} questions of {has} are not in {lacks}, the first is '{missing[0]}'; a "
                "paired comparison needs the same questions in both. Evaluate both on the same file."
            )


@dataclass(frozen=True)
class StageSummary:
    """One finished stage, from its ``stage.json``; None where the stage has no such number.

    Attributes:
        folder: Its output folder.
        stage: Name of the stage.
        purpose: Purpose in a few words.
        samples: Training samples it could draw from.
        steps: Optimizer steps.
        seconds: Wall-clock time, loading and saving included.
        engine: Class that ran the forward passes.
        zero_stage: ZeRO stage of DeepSpeed; 0 without it.
        world_size: Number of processes.
        calibration: Report of the calibration; empty where there was none.
        rule_base: Rule base in the folder.
    """

    folder: Path
    stage: str
    purpose: str = ""
    samples: int | None = None
    steps: int | None = None
    seconds: float | None = None
    engine: str | None = None
    zero_stage: int | None = None
    world_size: int | None = None
    calibration: dict[str, Any] = field(default_factory=dict, repr=False)
    rule_base: Path | None = None


def load_stage(folder: str | Path) -> StageSummary:
    """Read the summary in a stage's output folder.

    Raises:
        ValueError: If it is not JSON or does not name its stage.
        OSError: If there is no ``stage.json``.
    """
    folder = Path(folder)
    content = read_json(folder / "stage.json")
    if "stage" not in content:
        raise ValueError(
            f"{folder / 'stage.json'} does not name its 'stage'; the summary of a finished stage is needed. Pass the "
            "output folder of a stage."
        )
    keys = ("stage", "purpose", "samples", "steps", "seconds", "engine", "zero_stage", "world_size")
    facts = {key: content[key] for key in keys if key in content}
    rule_base = folder / RULE_BASE_FILE
    calibration = content.get("calibration") or {}
    return StageSummary(folder, calibration=calibration, rule_base=rule_base if rule_base.is_file() else None, **facts)


@dataclass(frozen=True)
class RunRow:
    """One run beside the reference.

    Attributes:
        run: The run.
        is_reference: Whether the others are compared with it.
        difference: Paired difference of its accuracy on images to the reference; None for the reference itself.
        prefill_ratio: Prefill time as a share of the reference's; None unless both were timed at the same batch size.
    """

    run: Evaluation
    is_reference: bool
    difference: PairedDifference | None
    prefill_ratio: float | None


@dataclass(frozen=True)
class Report:
    """Data of the closing tables and figures.

    Attributes:
        reference: The dense run with the best accuracy on questions about an image.
        rows: The runs: dense ones first, then by growing target skip ratio.
        stages: The stages, as given.
        rule_base: Rule base of the last stage that has one; None if none has.
    """

    reference: Evaluation
    rows: tuple[RunRow, ...]
    stages: tuple[StageSummary, ...] = ()
    rule_base: FuzzyRuleBase | None = None

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The runs, in the order of the rows."""
        return tuple(row.run for row in self.rows)

    @property
    def routed(self) -> tuple[RunRow, ...]:
        """The runs that skip layers."""
        return tuple(row for row in self.rows if not row.run.is_dense)


def load_report(evaluation_files: Sequence[str | Path], stage_folders: Sequence[str | Path] = ()) -> Report:
    """Read result files and stage folders, and compare the runs.

    Raises:
        ValueError: See ``build_report``; also if a file breaks its schema.
        OSError: If a file cannot be read.
    """
    stages = [load_stage(folder) for folder in stage_folders]
    return build_report([load_evaluation(path) for path in evaluation_files], stages)


def build_report(evaluations: Sequence[Evaluation], stages: Sequence[StageSummary] = ()) -> Report:
    """Compare runs with the best dense one, question by question.

    Args:
        evaluations: At least one dense run; all answered the same questions about images.
        stages: Stages to list.

    Raises:
        ValueError: If there is no dense run, two runs share a label, or runs answered different questions.
    """
    labels = [run.label for run in evaluations]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(
            f"The label '{twice[0]}' names {labels.count(twice[0])} runs; one each is allowed. Rename one."
        )
    dense = [run for run in evaluations if run.is_dense]
    if not dense:
        raise ValueError(
            f"None of the {len(evaluations)} runs is dense; at least one is needed to compare with (its "
            "target_skip_ratio is null). Evaluate the base model, or the checkpoint with routing off."
        )
    reference = max(dense, key=lambda run: run.image_accuracy)
    for run in evaluations:
        check_same_questions(reference.correct, run.correct, (str(reference.path), str(run.path)))
    routed = sorted((run for run in evaluations if not run.is_dense), key=lambda run: run.target_skip_ratio or 0.0)
    rule_base_path = next((stage.rule_base for stage in reversed(stages) if stage.rule_base), None)
    return Report(
        reference=reference,
        rows=tuple(_compare(run, reference) for run in (*dense, *routed)),
        stages=tuple(stages),
        rule_base=None if rule_base_path is None else load_rule_base(rule_base_path),
    )


def to_json(report: Report) -> dict[str, Any]:
    """Give the report as plain data, without the single answers."""
    runs = []
    for row in report.rows:
        facts = {name: value for name, value in row.run.to_dict().items() if name != "correct"}
        difference = None if row.difference is None else asdict(row.difference)
        compared = {"is_reference": row.is_reference, "difference": difference, "prefill_ratio": row.prefill_ratio}
        runs.append({**facts, **compared})
    stages = [
        {**vars(stage), "folder": str(stage.folder), "rule_base": stage.rule_base and str(stage.rule_base)}
        for stage in report.stages
    ]
    return {"reference": report.reference.label, "runs": runs, "stages": stages}


def _compare(run: Evaluation, reference: Evaluation) -> RunRow:
    ratio = None
    # the time of a prompt depends on how many share its batch
    if run.prefill_ms is not None and reference.prefill_ms and run.batch_size == reference.batch_size:
        ratio = run.prefill_ms / reference.prefill_ms
    difference = None if run is reference else paired_difference(reference.correct, run.correct)
    return RunRow(run, run is reference, difference, ratio)


@dataclass(frozen=True)
class Table:
    """A table of text, for a terminal or a page.

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
    groups = [
        {
            name: (accuracy, run.skip_rate.get("types", {}).get(name))
            for name, accuracy in run.accuracy.get("types", {}).items()
        }
        for run in report.evaluations
    ]
    names = tuple(dict.fromkeys(name for group in groups for name in group))
    return _group_table(report, "Accuracy (skip rate) by question type", "question type", names, groups)


def complexity_table(report: Report) -> Table:
    """Accuracy and skip rate per complexity of questions about images, a column per run."""
    groups = [
        {name: (level.get("accuracy"), level.get("skip_rate")) for name, level in run.complexity.items()}
        for run in report.evaluations
    ]
    levels = tuple(sorted({level for group in groups for level in group}))
    return _group_table(report, "Accuracy (skip rate) by complexity of the question", "complexity", levels, groups)


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


def count(number: int | None) -> str:
    """Write a whole number with thousands separators."""
    return NOT_MEASURED if number is None else f"{number:,}"


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


def _run_cells(row: RunRow) -> tuple[str, ...]:
    run = row.run
    return (
        run.label,
        "dense" if run.is_dense else percent(run.target_skip_ratio),
        percent(run.skip_rate.get("all") or 0.0),
        percent(run.image_skip_rate),
        percent(run.image_accuracy),
        "reference" if row.difference is None else points(row.difference),
        milliseconds(run.prefill_ms),
        milliseconds(run.decode_ms_per_token),
        NOT_MEASURED if row.prefill_ratio is None else f"{row.prefill_ratio:.2f}",
    )


Groups = list[dict[str, tuple[float | None, float | None]]]
"""Of every run: group -> accuracy and skip rate."""


def _group_table(report: Report, title: str, heading: str, names: tuple[str, ...], groups: Groups) -> Table:
    def cell(run: Evaluation, accuracy: float | None, skip_rate: float | None) -> str:
        is_plain = run.is_dense or skip_rate is None
        return percent(accuracy) if is_plain else f"{percent(accuracy)} ({percent(skip_rate)})"

    rows = tuple(
        (
            name,
            *(cell(run, *group.get(name, (None, None))) for run, group in zip(report.evaluations, groups, strict=True)),
        )
        for name in names
    )
    return Table(title, (heading, *(run.label for run in report.evaluations)), rows)
