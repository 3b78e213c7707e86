"""What the check of training data found, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llava.data.image_files import ImageState
from llava.data.json_index import DataError


@dataclass
class SourceCounts:
    """What one source holds.

    Attributes:
        records: Records of this source.
        bad: Of these, records that cannot be trained on, for whatever reason.
        invalid: Of these, records whose text is at fault, whatever their images are.
        images: Image references of the valid records.
        missing: Of these, images that are not in the folder.
        empty: Images of zero bytes.
        corrupt: Images that do not decode.
        resolved: Images found under another ending (counted only where that was asked for).
    """

    records: int = 0
    bad: int = 0
    invalid: int = 0
    images: int = 0
    missing: int = 0
    empty: int = 0
    corrupt: int = 0
    resolved: int = 0


MAX_TRUNCATED = 0.2
"""Largest share of records that may be cut without being asked for."""

WARN_TRUNCATED = 0.01
"""Share of cut records from which a warning is given."""

NUM_BINS = 8
"""Parts of the maximum length in the histogram of lengths."""


@dataclass
class LengthCounts:
    """How records fit the model's maximum length, image tokens included.

    Attributes:
        model_max_length: Tokens.
        records: Valid records.
        truncated: Of these, longer than ``model_max_length``.
        unlabelled: Of these, without a single trained token within it.
        longest: Tokens of the longest that was measured.
        sampled: Records that the histogram is of, drawn evenly over the file.
        histogram: Sampled records by length, in ``NUM_BINS`` equal parts of the maximum and one for what is longer.
    """

    model_max_length: int
    records: int = 0
    truncated: int = 0
    unlabelled: int = 0
    longest: int = 0
    sampled: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * (NUM_BINS + 1))

    @property
    def truncated_ratio(self) -> float:
        """Share of truncated records, in [0, 1]."""
        return self.truncated / max(1, self.records)

    @property
    def unlabelled_ratio(self) -> float:
        """Share of records without a trained token, in [0, 1]."""
        return self.unlabelled / max(1, self.records)

    def add_to_histogram(self, length: int) -> None:
        """Count one sampled record."""
        self.sampled += 1
        self.histogram[min(NUM_BINS, (length - 1) * NUM_BINS // self.model_max_length)] += 1

    def bin_edges(self) -> list[int]:
        """Largest length of each part of the histogram but the last, which has none."""
        return [self.model_max_length * (number + 1) // NUM_BINS for number in range(NUM_BINS)]


@dataclass
class DataReport:
    """What the check found.

    Attributes:
        data_path: The file that was checked.
        image_folder: Where its images are.
        on_missing: What was asked for.
        sources: Counts per source, sorted by name.
        errors: The first findings, one sentence each, in file order.
        num_bad: Records that cannot be trained on as they stand.
        bad_images: Every image that is missing, empty or corrupt, with its state.
        lengths: Counts of lengths where they were asked for.
        too_much: Why the file as a whole cannot be trained on, though each record can; one sentence each.
        warnings: What works but is probably a mistake.
        missing_list: File that lists ``bad_images``, None if there are none.
        output: Derived file of ``on_missing``, None if there is none.
        num_output: Records in ``output``.
    """

    data_path: Path
    image_folder: Path
    on_missing: str = "error"
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    num_bad: int = 0
    bad_images: dict[str, ImageState] = field(default_factory=dict)
    lengths: LengthCounts | None = None
    too_much: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing_list: Path | None = None
    output: Path | None = None
    num_output: int = 0

    @property
    def num_records(self) -> int:
        """Records in the file."""
        return sum(counts.records for counts in self.sources.values())

    @property
    def is_ok(self) -> bool:
        """Whether every record of ``usable_path`` can be trained on, and the file as a whole."""
        return (not self.num_bad or self.on_missing == "drop") and not self.too_much

    @property
    def usable_path(self) -> Path:
        """The file to train on: the derived one where one was written."""
        return self.output or self.data_path

    def raise_if_bad(self) -> None:
        """Raise DataError with the first findings unless ``is_ok``."""
        if self.is_ok:
            return
        if not self.num_bad or self.on_missing == "drop":
            raise DataError(f"{self.data_path}: {' '.join(self.too_much)}")
        more = self.num_bad - len(self.errors)
        lines = [*self.errors, *([f"... and {more:,} more"] if more > 0 else []), *self.too_much]
        where = f" All bad images: {self.missing_list}." if self.missing_list else ""
        raise DataError(
            f"{self.data_path}: {self.num_bad:,} of {self.num_records:,} records cannot be trained on; none may be. "
            f"Mend them, or write a file without them: fuzzyroe check-data ... --on-missing drop.{where}\n"
            + "\n".join(lines)
        )
