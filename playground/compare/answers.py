"""Answers of a checkpoint to the held-out questions at several operating points in turns; and its oracle.

The oracle leaves out, for every held-out question, the layers whose absence hurts its known answer least.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.data import DataLoader, Subset

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder, set_router
from fuzzyroe.routers import OracleRouter
from fuzzyroe.routers.oracle import LabelledBatch, search_plans
from fuzzyroe.routing_state import RoutingState
from llava.conversation import get_template
from llava.data.dataset import SFTCollator, SFTDataset
from llava.inference.generator import GenerationOptions, Generator, Message, make_message
from llava.model.builder import Checkpoint
from llava.model.families import count_image_tokens, get_image_token_id
from playground.compare.arms import MAX_LENGTH, TRAINED, Point
from playground.digits.lmms_eval.utils import doc_to_target, doc_to_text, doc_to_visual, normalise

BATCH_SIZE, ORACLE_BATCH_SIZE = 64, 60

TIMED_BATCHES = 12
"""Batches that the dense model answers beside the routed ones, spread over all of them, so that times compare."""

REFERENCE = "reference"
"""Key of the dense model's seconds."""


def load_questions(data: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the held-out questions about an image, short ones first, so that batches hold few padded positions.

    Args:
        data: Folder of the digits dataset.
        limit: Take this many, spread over the file; None takes all.
    """
    records = [record for record in json.loads((data / "digits_test.json").read_text()) if record.get("image")]
    step = 1 if limit is None else max(1, len(records) // limit)
    return sorted(records[::step][:limit], key=lambda record: (len(doc_to_text(record, {})), record["id"]))


def read_message(record: dict[str, Any], data: Path) -> Message:
    """The question of a record of the digits dataset, with its image."""
    return make_message(doc_to_text(record, {}), doc_to_visual(record, {"data_folder": data}))


def choose_point(model: Any, point: Point) -> None:
    """Set what a model skips from now on, see ``Point``."""
    if point != TRAINED:
        set_skip_rate(model, point)
        return
    router = find_decoder(model).router
    router.reset_target()
    router.enabled = True


def answer_questions(
    checkpoint: Checkpoint, questions: Sequence[dict[str, Any]], data: Path, points: Sequence[Point]
) -> tuple[dict[Point, pd.DataFrame], Counter]:
    """Ask a checkpoint in eval mode every question at every point; batch by batch the points take turns.

    Returns:
        Point -> a row for each question, in their order: ``id``, normalised ``text``, ``correct``, and the share of
        layers that it ``skipped``. And CPU seconds in the timed batches, by point and for ``REFERENCE``.
    """
    generator, options = Generator(checkpoint, get_template("digits")), GenerationOptions(max_new_tokens=64)
    rows: dict[Point, list[tuple]] = {point: [] for point in points}
    seconds: Counter = Counter()
    starts = range(0, len(questions), BATCH_SIZE)
    timed = set(starts[:: max(1, len(starts) // TIMED_BATCHES)])
    for start in starts:
        batch = questions[start : start + BATCH_SIZE]
        messages = [read_message(question, data) for question in batch]
        for point in (REFERENCE, *points) if start in timed else points:
            choose_point(checkpoint.model, None if point == REFERENCE else point)
            started = time.process_time()
            output = generator.generate(messages, options)
            seconds[point] += (time.process_time() - started) * (start in timed)
            if point == REFERENCE:
                continue
            skipped = output.prefill_skip_rates.tolist()
            for question, answer, share in zip(batch, output.texts, skipped, strict=True):
                text = normalise(answer)
                is_correct = int(text == normalise(doc_to_target(question)))
                rows[point].append((question["id"], text, is_correct, share))
    columns = ["id", "text", "correct", "skipped"]
    return {point: pd.DataFrame(own, columns=columns) for point, own in rows.items()}, seconds


def open_dataset(checkpoint: Checkpoint, records: Path, images: Path) -> SFTDataset:
    """Digits records as samples of a checkpoint."""
    config = checkpoint.model.config
    places = count_image_tokens(config), get_image_token_id(config)
    processors = checkpoint.tokenizer, checkpoint.image_processor
    return SFTDataset(records, images, *processors, "digits", *places, MAX_LENGTH, "square")


def give_oracle(checkpoint: Checkpoint, questions: Sequence[dict[str, Any]], data: Path, max_skips: int) -> int:
    """Put an oracle in the place of a checkpoint's router: plans of at most ``max_skips`` layers for these questions.

    Returns:
        Passes through the decoder that the search took, in samples.
    """
    passes: Counter = Counter()

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passes["search"] += len(kwargs["input_ids"])

    handle = checkpoint.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        found = search_plans(checkpoint.model, _labelled_batches(checkpoint, questions, data), max_skips)
    finally:
        handle.remove()
    set_router(checkpoint.model, OracleRouter.from_search(*found))
    return passes["search"]


def _labelled_batches(
    checkpoint: Checkpoint, questions: Sequence[dict[str, Any]], data: Path
) -> Iterator[LabelledBatch]:
    file, image_token_id = data / "digits_test.json", get_image_token_id(checkpoint.model.config)
    places = {record["id"]: index for index, record in enumerate(json.loads(file.read_text()))}
    asked = Subset(open_dataset(checkpoint, file, data / "images"), [places[record["id"]] for record in questions])
    collator = SFTCollator(checkpoint.tokenizer.pad_token_id)
    for batch in DataLoader(asked, ORACLE_BATCH_SIZE, collate_fn=collator):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        yield LabelledBatch(inputs, batch["labels"], RoutingState.from_batch(batch, image_token_id))
