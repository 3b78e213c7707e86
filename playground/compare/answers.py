"""Answers of one checkpoint to the held-out questions, dense and at several skip rates in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava.conversation import get_template
from llava.eval.generation import Generator, Message, make_message
from llava.eval.generation_options import GenerationOptions
from llava.model.builder import Checkpoint
from llava.model.routing import set_budget
from playground.digits.lmms_eval.utils import IMAGE_MARKER, doc_to_target, normalise

BATCH_SIZE = 64


@dataclass
class Answers:
    """What came of all questions at one skip rate.

    Attributes:
        texts: Normalised answers in the order of the questions.
        correct: 1 where the answer is right, else 0.
        skipped: Share of the layers that each question skipped.
        seconds: CPU seconds of all generation.
    """

    texts: list[str] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def skip_rate(self) -> float:
        """Mean share of skipped layers."""
        return sum(self.skipped) / len(self.skipped)

    def agreement(self, other: Sequence[str]) -> float:
        """Share of answers that are the same as others to the same questions."""
        return sum(mine == theirs for mine, theirs in zip(self.texts, other, strict=True)) / len(self.texts)


def load_questions(data: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the held-out questions about an image.

    Args:
        data: Folder of the digits dataset.
        limit: Take this many, spread over the file; None takes all.
    """
    records = [record for record in json.loads((data / "digits_test.json").read_text()) if record.get("image")]
    step = 1 if limit is None else max(1, len(records) // limit)
    return records[::step][:limit]


def answer_questions(
    checkpoint: Checkpoint, questions: Sequence[dict[str, Any]], images: Path, rates: Sequence[float | None]
) -> dict[float | None, Answers]:
    """Ask a checkpoint every question at every skip rate; batch by batch the rates take turns, so that times compare.

    Args:
        checkpoint: Loaded checkpoint in eval mode.
        questions: Records of the digits dataset.
        images: Folder that their images lie in.
        rates: Mean skip rates; None is the dense model.

    Returns:
        Skip rate -> answers, in the order of the questions.
    """
    generator = Generator(checkpoint, get_template("digits"))
    options = GenerationOptions(max_new_tokens=64)
    found = {rate: Answers() for rate in rates}
    for batch in _batches(questions):
        messages = [_message(question, images) for question in batch]
        targets = [normalise(doc_to_target(question)) for question in batch]
        for rate, answers in found.items():
            set_budget(checkpoint.model, rate)
            started = time.process_time()
            output = generator.generate(messages, options)
            answers.seconds += time.process_time() - started
            texts = [normalise(text) for text in output.texts]
            answers.texts += texts
            answers.correct += [int(text == target) for text, target in zip(texts, targets, strict=True)]
            answers.skipped += (1 - output.kept_layers.float().mean(dim=1)).tolist()
    return found


def _batches(questions: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    for start in range(0, len(questions), BATCH_SIZE):
        yield questions[start : start + BATCH_SIZE]


def _message(question: dict[str, Any], images: Path) -> Message:
    with Image.open(images / question["image"]) as image:
        return make_message(question["conversations"][0]["value"].removeprefix(IMAGE_MARKER), [image.convert("RGB")])
