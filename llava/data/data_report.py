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
        corrupt: Images that do not decode (counted only where decoding was asked for).
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


@dataclass
class LengthCounts:
    """How records fit the model's maximum length, image tokens included.

    Attributes:
        model_max_length: Tokens.
        measured: Valid records.
        truncated: Of these, longer than ``model_max_length``.
        unlabelled: Of these, without a single trained token within it.
        longest: Tokens of the longest.
    """

    model_max_length: int
    measured: int = 0
    truncated: int = 0
    unlabelled: int = 0
    longest: int = 0

    @property
    def truncated_ratio(self) -> float:
        """Share of truncated records, in [0, 1]."""
        return self.truncated / max(1, self.measured)

    @property
    def unlabelled_ratio(self) -> float:
        """Share of records without a trained token, in [0, 1]."""
        return self.unlabelled / max(1, self.measured)


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
    missing_list: Path | None = None
    output: Path | None = None
    num_output: int = 0

    @property
    def num_records(self) -> int:
        """Records in the file."""
        return sum(counts.records for counts in self.sources.values())

    @property
    def is_ok(self) -> bool:
        """Whether every record of ``usable_path`` can be trained on."""
        return not self.num_bad or self.on_missing == "drop"

    @property
    def usable_path(self) -> Path:
        """The file to train on: the derived one where one was written."""
        return self.output or self.data_path

    def raise_if_bad(self) -> None:
        """Raise DataError with the first findings unless ``is_ok``."""
        if self.is_ok:
            return
        more = self.num_bad - len(self.errors)
        lines = [*self.errors, *([f"... and {more:,} more"] if more > 0 else [])]
        where = f" All bad images: {self.missing_list}." if self.missing_list else ""
        raise DataError(
            f"{self.data_path}: {self.num_bad:,} of {self.num_records:,} records cannot be trained on; none may be. "
            f"Mend them, or write a file without them (on_missing='drop').{where}\n" + "\n".join(lines)
        )
