"""Answers of a model to the held-out questions, dense and at several operating points in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder
from llava.conversation import get_template
from llava.inference.generator import GenerationOptions, Generator, Message, make_message
from llava.model.builder import Checkpoint
from playground.digits.lmms_eval.utils import IMAGE_MARKER, doc_to_target, normalise

BATCH_SIZE = 64

TIMED_BATCHES = 12
"""Batches that the dense model answers beside the routed ones, spread over all of them, so that times compare."""

TRAINED = "trained"
"""The operating point that linear routers were trained for."""

Point = float | str | None


@dataclass
class Answers:
    """What came of the questions at one operating point.

    Attributes:
        texts: Normalised answers in the order of the questions.
        correct: 1 where the answer is right, else 0.
        skipped: Share of the layers that each question skipped.
        timed_seconds: CPU seconds of generation in the timed batches.
    """

    texts: list[str] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    timed_seconds: float = 0.0


def load_questions(data: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the held-out questions about an image, short ones first, so that batches hold few padded positions.

    Args:
        data: Folder of the digits dataset.
        limit: Take this many, spread over the file; None takes all.
    """
    records = [record for record in json.loads((data / "digits_test.json").read_text()) if record.get("image")]
    step = 1 if limit is None else max(1, len(records) // limit)
    return sorted(records[::step][:limit], key=lambda record: (len(question_of(record)), record["id"]))


def question_of(record: dict[str, Any]) -> str:
    """The question of a record, without the mark of its image."""
    return record["conversations"][0]["value"].removeprefix(IMAGE_MARKER)


def message_of(record: dict[str, Any], images: Path) -> Message:
    """The question with its image."""
    with Image.open(images / record["image"]) as image:
        return make_message(question_of(record), [image.convert("RGB")])


def choose_point(model: Any, point: Point) -> None:
    """Set what a model skips from now on: a mean skip rate, ``TRAINED``, or None for nothing."""
    if point != TRAINED:
        set_skip_rate(model, point)
        return
    router = find_decoder(model).router
    router.reset_target()
    router.enabled = True


def answer_questions(
    checkpoint: Checkpoint, questions: Sequence[dict[str, Any]], images: Path, points: Sequence[Point]
) -> tuple[dict[Point, Answers], float]:
    """Ask a checkpoint every question at every point; batch by batch the points take turns.

    Args:
        checkpoint: Loaded checkpoint in eval mode.
        questions: Records of the digits dataset.
        images: Folder that their images lie in.
        points: As for ``choose_point``.

    Returns:
        Point -> answers, in the order of the questions; and the dense model's CPU seconds in the timed batches.
    """
    generator, options = Generator(checkpoint, get_template("digits")), GenerationOptions(max_new_tokens=64)
    found: dict[Point, Answers] = {point: Answers() for point in points}
    starts = range(0, len(questions), BATCH_SIZE)
    timed = set(starts[:: max(1, len(starts) // TIMED_BATCHES)])
    dense_seconds = 0.0
    for start in starts:
        batch = questions[start : start + BATCH_SIZE]
        messages = [message_of(record, images) for record in batch]
        targets = [normalise(doc_to_target(record)) for record in batch]
        if start in timed:
            choose_point(checkpoint.model, None)
            dense_seconds += _generate(generator, messages, options)[1]
        for point, answers in found.items():
            choose_point(checkpoint.model, point)
            output, seconds = _generate(generator, messages, options)
            answers.timed_seconds += seconds * (start in timed)
            texts = [normalise(text) for text in output.texts]
            answers.texts += texts
            answers.correct += [int(text == target) for text, target in zip(texts, targets, strict=True)]
            answers.skipped += (1 - output.kept_layers.float().mean(dim=1)).tolist()
    return found, dense_seconds


def _generate(generator: Generator, messages: list[Message], options: GenerationOptions) -> tuple[Any, float]:
    started = time.process_time()
    output = generator.generate(messages, options)
    return output, time.process_time() - started
