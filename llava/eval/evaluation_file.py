"""The result file of one evaluation run, ``evaluation.json``, validated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROUNDING = 5e-4
"""How far an accuracy in the file may be from the one counted from its answers."""

_NEEDED = ("label", "accuracy", "correct")


@dataclass(frozen=True)
class Evaluation:
    """One run over one set of questions. Ratios are in [0, 1]; what was not measured is None.

    Attributes:
        path: File it was read from.
        label: Name of the run, unique in a report.
        checkpoint: Checkpoint it ran.
        target_skip_rate: Skip rate asked for; None for a dense run.
        items: Number of questions.
        accuracy: Over all questions.
        image_accuracy: Over questions about an image.
        text_accuracy: Over questions without an image.
        accuracy_by_type: Per question type.
        skip_rate: Observed, over all questions.
        image_skip_rate: Observed, over questions about an image.
        skip_rate_by_type: Observed, per question type.
        skip_rate_by_layer: Observed, per layer, (L,).
        layer_skip_rates: Observed, per question type and layer, (L,) each.
        prefill_ms: Milliseconds from a prompt to its first token, its share of a batch of ``batch_size`` prompts.
        decode_ms: Milliseconds per decoded token.
        batch_size: Prompts per batch while timing.
        correct: 1 or 0 per question about an image.
        accuracy_by_complexity: Per complexity of questions about an image.
        skip_rate_by_complexity: The same for the observed skip rate.
    """

    path: Path
    label: str
    checkpoint: str
    target_skip_rate: float | None
    items: int | None
    accuracy: float | None
    image_accuracy: float
    text_accuracy: float | None
    accuracy_by_type: dict[str, float]
    skip_rate: float
    image_skip_rate: float
    skip_rate_by_type: dict[str, float]
    skip_rate_by_layer: tuple[float, ...]
    layer_skip_rates: dict[str, tuple[float, ...]]
    prefill_ms: float | None
    decode_ms: float | None
    batch_size: int | None
    correct: dict[str, int] = field(repr=False)
    accuracy_by_complexity: dict[str, float] = field(default_factory=dict)
    skip_rate_by_complexity: dict[str, float] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether every layer ran for every question because nothing else was asked for."""
        return self.target_skip_rate is None


def load_evaluation(path: str | Path) -> Evaluation:
    """Read one result file.

    Raises:
        ValueError: If it is not JSON, a key is missing, a number is out of range, or ``correct`` does not hold exactly
            the questions about an image.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    content = read_json(path)
    missing = [key for key in _NEEDED if key not in content]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; an evaluation holds {', '.join(_NEEDED)}. Pass an evaluation.json, "
            "or evaluate again."
        )
    reader = _Reader(path)
    accuracy, skip = reader.mapping(content, "accuracy"), reader.mapping(content, "skip_rate")
    complexity = reader.mapping(content, "complexity")
    levels = {level: reader.mapping(complexity, level) for level in complexity}
    evaluation = Evaluation(
        path=path,
        label=str(content["label"]),
        checkpoint=str(content.get("checkpoint", "")),
        target_skip_rate=reader.ratio(content, "skip_rate_target"),
        items=content.get("items"),
        accuracy=reader.ratio(accuracy, "all"),
        image_accuracy=reader.ratio(accuracy, "image", is_needed=True),
        text_accuracy=reader.ratio(accuracy, "text_only"),
        accuracy_by_type=reader.ratios(reader.mapping(accuracy, "types")),
        skip_rate=reader.ratio(skip, "all") or 0.0,
        image_skip_rate=reader.ratio(skip, "image") or 0.0,
        skip_rate_by_type=reader.ratios(reader.mapping(skip, "types")),
        skip_rate_by_layer=reader.layers(skip.get("layers") or [], "layers"),
        layer_skip_rates={
            name: reader.layers(rates, f"layers_by_type.{name}")
            for name, rates in reader.mapping(skip, "layers_by_type").items()
        },
        prefill_ms=reader.number(content, "prefill_ms"),
        decode_ms=reader.number(content, "decode_ms_per_token"),
        batch_size=content.get("batch_size"),
        correct={str(key): int(value) for key, value in reader.mapping(content, "correct").items()},
        accuracy_by_complexity=reader.ratios_in(levels, "accuracy"),
        skip_rate_by_complexity=reader.ratios_in(levels, "skip_rate"),
    )
    _check_answers(evaluation)
    return evaluation


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); a JSON object is needed. Write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is needed. Pass another file.")
    return content


def _check_answers(evaluation: Evaluation) -> None:
    """Answers must be those of the questions about an image: their mean is the accuracy on images."""
    if not evaluation.correct:
        raise ValueError(
            f"{evaluation.path} has no answer in 'correct'; 1 or 0 per question about an image is needed. "
            "Evaluate again."
        )
    mean = sum(evaluation.correct.values()) / len(evaluation.correct)
    if abs(mean - evaluation.image_accuracy) > ROUNDING:
        raise ValueError(
            f"{evaluation.path}: the {len(evaluation.correct)} answers in 'correct' have mean {mean:.4f}, but "
            f"accuracy.image is {evaluation.image_accuracy:.4f}; they must be the same questions. Keep the questions "
            "about an image only in 'correct'."
        )


@dataclass(frozen=True)
class _Reader:
    """Reads values of one file; its errors name the file."""

    path: Path

    def mapping(self, parent: Mapping[str, Any], key: str) -> dict[str, Any]:
        """A mapping, empty where it is absent or null."""
        value = parent.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: '{key}' is {value!r:.60}; an object is needed. Correct the file.")
        return value

    def number(self, parent: Mapping[str, Any], key: str) -> float | None:
        """A finite number of at least 0; None where it is absent or null."""
        value = parent.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{self.path}: '{key}' is {value!r:.60}; a number from 0 up is needed. Correct the file.")
        return float(value)

    def ratio(self, parent: Mapping[str, Any], key: str, is_needed: bool = False) -> float | None:
        """A number in [0, 1]."""
        value = self.number(parent, key)
        if (value is None and is_needed) or (value is not None and value > 1):
            raise ValueError(f"{self.path}: '{key}' is {value}; a ratio in [0, 1] is needed. Correct the file.")
        return value

    def ratios(self, parent: Mapping[str, Any]) -> dict[str, float]:
        """A mapping of ratios; entries without a value are left out."""
        values = {str(key): self.ratio(parent, key) for key in parent}
        return {key: value for key, value in values.items() if value is not None}

    def ratios_in(self, parents: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float]:
        """One ratio out of each of several mappings; mappings without it are left out."""
        values = {name: self.ratio(parent, key) for name, parent in parents.items()}
        return {name: value for name, value in values.items() if value is not None}

    def layers(self, rates: Any, what: str) -> tuple[float, ...]:
        """A list of ratios, one per layer."""
        if not isinstance(rates, list):
            raise ValueError(f"{self.path}: '{what}' is {rates!r:.60}; a list of ratios is needed. Correct the file.")
        return tuple(self.ratio({what: rate}, what, is_needed=True) for rate in rates)
