"""The closing report: evaluations of several runs, compared on the same questions with the stages that made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.yaml_io import load_rule_base
from llava.eval.evaluation_file import Evaluation, load_evaluation
from llava.eval.stage_file import StageSummary, load_stage
from llava.eval.statistics import PairedDifference, check_same_questions, paired_difference


@dataclass(frozen=True)
class RunRow:
    """One run beside the reference. Ratios are in [0, 1]; what was not measured is None.

    Attributes:
        label: Name of the run.
        is_dense: Whether it ran every layer.
        is_reference: Whether the others are compared with it.
        target_skip_rate: Skip rate asked for; None for a dense run.
        skip_rate: Observed, over all questions.
        image_skip_rate: Observed, over questions about an image.
        image_accuracy: Accuracy on questions about an image.
        difference: Paired difference of that accuracy to the reference; None for the reference itself.
        prefill_ms: Milliseconds from a prompt to its first token.
        decode_ms: Milliseconds per decoded token.
        prefill_ratio: Prefill time as a share of the reference's; None unless both were timed at the same batch size.
    """

    label: str
    is_dense: bool
    is_reference: bool
    target_skip_rate: float | None
    skip_rate: float
    image_skip_rate: float
    image_accuracy: float
    difference: PairedDifference | None
    prefill_ms: float | None
    decode_ms: float | None
    prefill_ratio: float | None


@dataclass(frozen=True)
class Report:
    """Everything the closing tables and figures show.

    Attributes:
        evaluations: The runs: dense ones first, then by growing target skip rate.
        reference: The dense run with the best accuracy on questions about an image.
        rows: One per run, in the same order.
        stages: The stages, as given.
        rule_base: Rule base of the last stage that has one; None if none has.
    """

    evaluations: tuple[Evaluation, ...]
    reference: Evaluation
    rows: tuple[RunRow, ...]
    stages: tuple[StageSummary, ...] = ()
    rule_base: FuzzyRuleBase | None = None

    @property
    def routed(self) -> tuple[Evaluation, ...]:
        """The runs that skip layers."""
        return tuple(evaluation for evaluation in self.evaluations if not evaluation.is_dense)


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
            "skip_rate_target is null). Evaluate the base model, or the checkpoint with routing off."
        )
    reference = max(dense, key=lambda run: run.image_accuracy)
    for run in evaluations:
        check_same_questions(reference.correct, run.correct, (str(reference.path), str(run.path)))
    ordered = (*dense, *sorted((run for run in evaluations if not run.is_dense), key=lambda run: run.target_skip_rate))
    rule_base_path = next((stage.rule_base for stage in reversed(stages) if stage.rule_base), None)
    return Report(
        evaluations=ordered,
        reference=reference,
        rows=tuple(_row(run, reference) for run in ordered),
        stages=tuple(stages),
        rule_base=None if rule_base_path is None else load_rule_base(rule_base_path),
    )


def to_json(report: Report) -> dict[str, Any]:
    """Give the report as plain data, without the single answers."""
    return {
        "reference": report.reference.label,
        "runs": [asdict(row) for row in report.rows],
        "evaluations": [_plain(evaluation, "correct") for evaluation in report.evaluations],
        "stages": [_plain(stage) for stage in report.stages],
    }


def _row(run: Evaluation, reference: Evaluation) -> RunRow:
    is_comparable = None not in (run.prefill_ms, reference.prefill_ms) and run.batch_size == reference.batch_size
    return RunRow(
        label=run.label,
        is_dense=run.is_dense,
        is_reference=run is reference,
        target_skip_rate=run.target_skip_rate,
        skip_rate=run.skip_rate,
        image_skip_rate=run.image_skip_rate,
        image_accuracy=run.image_accuracy,
        difference=None if run is reference else paired_difference(reference.correct, run.correct),
        prefill_ms=run.prefill_ms,
        decode_ms=run.decode_ms,
        prefill_ratio=run.prefill_ms / reference.prefill_ms if is_comparable and reference.prefill_ms else None,
    )


def _plain(record: Evaluation | StageSummary, *left_out: str) -> dict[str, Any]:
    values = {key: value for key, value in vars(record).items() if key not in left_out}
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
