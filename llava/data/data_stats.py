"""What training data consists of: records, images, turns and words per source, without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.records import DataError, Record, RecordFile

_REPORT_EVERY = 1024


@dataclass
class SourceStats:
    """What one source, or all of them, holds.

    Attributes:
        records: Valid records.
        with_image: Of these, records with at least one image.
        images: Image references.
        turns: Turns of each record.
        question_words: Words of all questions of each record, image tags not counted.
        answer_words: Words of all answers of each record.
    """

    records: int = 0
    with_image: int = 0
    images: int = 0
    turns: list[int] = field(default_factory=list)
    question_words: list[int] = field(default_factory=list)
    answer_words: list[int] = field(default_factory=list)

    @property
    def text_only(self) -> int:
        """Records without an image."""
        return self.records - self.with_image

    def add(self, record: Record) -> None:
        """Count one record."""
        self.records += 1
        self.with_image += bool(record.images)
        self.images += len(record.images)
        self.turns.append(len(record.turns))
        questions = (turn.question.replace(DEFAULT_IMAGE_TOKEN, " ") for turn in record.turns)
        self.question_words.append(sum(len(question.split()) for question in questions))
        self.answer_words.append(sum(len(turn.answer.split()) for turn in record.turns))


@dataclass
class DataStats:
    """What a file of records holds.

    Attributes:
        sources: Counts per source, sorted by name.
        total: Counts over all sources.
        unusable: Records that break the format.
    """

    sources: dict[str, SourceStats] = field(default_factory=dict)
    total: SourceStats = field(default_factory=SourceStats)
    unusable: int = 0


def collect_stats(data_path: str | Path, progress: Callable[[int, int], None] | None = None) -> DataStats:
    """Count records, images, turns and words.

    Args:
        data_path: JSON array or JSON Lines file of records.
        progress: Called now and then with (records done, records).

    Returns:
        The counts; images are not looked at.

    Raises:
        DataError: If the file cannot be read at all.
    """
    records, stats = RecordFile(data_path), DataStats()
    for index in range(len(records)):
        try:
            record = records[index]
        except DataError:
            stats.unusable += 1
            continue
        stats.total.add(record)
        stats.sources.setdefault(record.source, SourceStats()).add(record)
        if progress and (index + 1) % _REPORT_EVERY == 0:
            progress(index + 1, len(records))
    if progress:
        progress(len(records), len(records))
    stats.sources = dict(sorted(stats.sources.items()))
    return stats


def quantiles(counts: list[int]) -> tuple[int, int, int]:
    """Median, 95 % quantile and maximum, as numbers that occur; zeros where there is nothing."""
    if not counts:
        return 0, 0, 0
    middle, high = np.quantile(counts, [0.5, 0.95], method="lower")
    return int(middle), int(high), max(counts)
