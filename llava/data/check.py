"""The check of training data that runs before a model is loaded: counts per source, and what cannot be trained on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.data.images import ImageState, find_other_extension, inspect_image
from llava.data.preprocess import LengthMeter
from llava.data.records import DataError, Record, RecordError, RecordFile, image_names, name_record, source_of
from llava.data.subset import OutputFile, check_output_path, make_manifest, sha256_of, to_json, write_outputs
from llava.files import atomic_write

ON_MISSING = ("error", "drop", "resolve")
UNREADABLE = "unreadable"
MAX_TRUNCATED = 0.2
"""Largest share of records that may be cut without being asked for."""
WARN_TRUNCATED = 0.01
"""Share of cut records from which a warning is given."""
NUM_BINS = 8
"""Parts of the maximum length in the histogram of lengths."""
NUM_THREADS = 16
"""Threads that look at images: most of the time goes into waiting for a disk or a network."""
_BLOCK = 1024
_OWN_LIST = re.compile(r"[^\n]*\t(missing|empty|corrupt)\n")


@dataclass
class SourceCounts:
    """What one source holds."""

    records: int = 0  # records of this source
    bad: int = 0  # of these, records that cannot be trained on, for whatever reason
    invalid: int = 0  # of these, records whose text is at fault, whatever their images are
    images: int = 0  # image references of the valid records
    missing: int = 0  # of these, images that are not in the folder
    empty: int = 0  # images of zero bytes
    corrupt: int = 0  # images that do not decode
    resolved: int = 0  # images found under another extension (counted only where that was asked for)


@dataclass
class LengthCounts:
    """How records fit the model's maximum length, image tokens included."""

    model_max_length: int  # tokens
    records: int = 0  # valid records
    truncated: int = 0  # of these, longer than ``model_max_length``
    unlabelled: int = 0  # of these, without a single trained token within it
    longest: int = 0  # tokens of the longest that was measured
    sampled: int = 0  # records that the histogram is of, drawn evenly over the file
    # sampled records by length, in ``NUM_BINS`` equal parts of the maximum and one for what is longer
    histogram: list[int] = field(default_factory=lambda: [0] * (NUM_BINS + 1))

    @property
    def truncated_ratio(self) -> float:
        """Share of truncated records, in [0, 1]."""
        return self.truncated / max(1, self.records)

    def add_to_histogram(self, length: int) -> None:
        """Count one sampled record."""
        self.sampled += 1
        self.histogram[min(NUM_BINS, (length - 1) * NUM_BINS // self.model_max_length)] += 1

    def bin_edges(self) -> list[int]:
        """Largest length of each part of the histogram but the last, which has none."""
        return [self.model_max_length * (number + 1) // NUM_BINS for number in range(NUM_BINS)]


@dataclass
class DataReport:
    """What the check came to."""

    data_path: Path  # the file that was checked
    image_folder: Path  # where its images are
    on_missing: str = "error"  # what was asked for
    sources: dict[str, SourceCounts] = field(default_factory=dict)  # counts per source, sorted by name
    errors: list[str] = field(default_factory=list)  # the first bad records, one sentence each, in file order
    num_bad: int = 0  # records that cannot be trained on as they stand
    # every image that is missing, empty or corrupt, with its state
    bad_images: dict[str, ImageState] = field(default_factory=dict)
    lengths: LengthCounts | None = None  # counts of lengths where they were asked for
    # why the file as a whole cannot be trained on, though each record can; one sentence each
    too_much: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what works but is probably a mistake
    missing_list: Path | None = None  # file that lists ``bad_images``, None if there is none
    output: Path | None = None  # file that ``on_missing`` wrote, None if there is none
    num_output: int = 0  # records in ``output``

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
        """The file to train on: the one that ``on_missing`` wrote, where it wrote one."""
        return self.output or self.data_path

    def raise_if_bad(self) -> None:
        """Raise DataError with the first bad records unless ``is_ok``."""
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


def check_data(
    data_path: str | Path,
    image_folder: str | Path,
    *,
    conv_template: str | None = None,
    decode: bool = False,
    on_missing: str = "error",
    output: str | Path | None = None,
    overwrite: bool = False,
    command: str = "",
    missing_list: str | Path | None = None,
    max_shown: int = 20,
    meter: LengthMeter | None = None,
    allow_truncation: bool = False,
    num_sampled: int = 2000,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at every record and every image that training would read.

    Args:
        data_path: JSON array or JSON Lines file of records; never touched.
        image_folder: Folder that image names are relative to.
        conv_template: Conversation template of the training, to be a known one.
        decode: Whether to decode every image too (minutes to hours) instead of its header and ends only.
        on_missing: ``error`` only reports; ``drop`` writes a file without the records that cannot be trained on;
            ``resolve`` writes a file in which images saved under another extension are named as they are.
        output: File for ``drop`` and ``resolve``; ``STEM.drop.SUFFIX`` beside the input if None.
        overwrite: Whether other content at ``output`` may be replaced.
        command: Command line to put into the manifest of ``output``.
        missing_list: Where to list bad images, one ``name TAB state`` per line; ``missing_images.txt`` beside the
            output or the input if None. A list of an earlier check there is replaced, emptied if nothing is bad; any
            other file is kept.
        max_shown: Most bad records to keep as sentences.
        meter: Measures lengths; every record that could be too long is measured. One without a trained token within
            the maximum, or whose image does not fit, cannot be trained on.
        allow_truncation: Whether more than a fifth of the records may be cut.
        num_sampled: Records that are measured in any case, for the histogram of lengths.
        progress: Called after each block with (records done, records).

    Raises:
        DataError: If the data cannot be read at all, an argument is wrong, or nothing would be left after ``drop``.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "data.jsonl")
    ...     _ = path.write_text('{"id": 1, "image": "coco/1.jpg", "conversations": []}')
    ...     report = check_data(path, folder)
    >>> report.is_ok, report.sources["coco"].invalid
    (False, 1)
    """
    data_path, image_folder = Path(data_path), Path(image_folder)
    _check_arguments(image_folder, conv_template, on_missing, output)
    records = RecordFile(data_path)
    output = Path(output or data_path.with_name(f"{data_path.stem}.{on_missing}{data_path.suffix}"))
    if on_missing != "error":
        check_output_path(output, data_path)
    report = DataReport(data_path, image_folder, on_missing)
    checks = _RecordChecks(report, decode, meter, max(1, len(records) // max(1, num_sampled)))
    is_good = np.ones(len(records), dtype=bool)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(records), _BLOCK):
            stop = min(start + _BLOCK, len(records))
            block = [_read(records, index) for index in range(start, stop)]
            checks.look_up_images(block, pool)
            for index, record in enumerate(block, start):
                problem = checks.run(records, index, record)
                is_good[index] = not problem
                if problem and len(report.errors) < max_shown:
                    report.errors.append(problem)
            if progress:
                progress(stop, len(records))
    report.sources = dict(sorted(report.sources.items()))
    report.num_bad = sum(counts.bad for counts in report.sources.values())
    report.bad_images = {
        name: state
        for name, (state, _) in checks.states.items()
        if state is not ImageState.GOOD and name not in checks.renamed
    }
    _judge_lengths(report, allow_truncation)
    if on_missing != "error":
        _write_output(report, records, is_good, checks.renamed, output, overwrite, command)
    _write_missing_list(report, Path(missing_list or report.usable_path.with_name("missing_images.txt")))
    return report


def _check_arguments(image_folder: Path, conv_template: str | None, on_missing: str, output: str | Path | None) -> None:
    if conv_template is not None and conv_template not in conv_templates:
        known = ", ".join(sorted(conv_templates))
        raise DataError(f"Conversation template '{conv_template}' is unknown; {known} are known. Choose one of them.")
    if on_missing not in ON_MISSING:
        known = ", ".join(ON_MISSING)
        raise DataError(f"on_missing '{on_missing}' is unknown; {known} are allowed. Choose one of them.")
    if output is not None and on_missing == "error":
        raise DataError("on_missing='error' writes none, but an output was named; name it with drop or resolve only.")
    if not image_folder.is_dir():
        raise DataError(f"Image folder {image_folder} is not a folder; it must be. Check the path or get the images.")


def _read(records: RecordFile, index: int) -> Record | RecordError:
    try:
        return records[index]
    except RecordError as error:
        return error


class _RecordChecks:
    """Everything that is asked of one record; each check counts what it meets and yields what is wrong.

    Attributes:
        states: State of every image that was looked up, and the reason where it is not good.
        renamed: Images that are there under another extension, where that was asked for.
    """

    def __init__(self, report: DataReport, decode: bool, meter: LengthMeter | None, step: int) -> None:
        self.report, self.decode, self.meter, self.step = report, decode, meter, step
        self.report.lengths = None if meter is None else LengthCounts(meter.max_length)
        self.states: dict[str, tuple[ImageState, str]] = {}
        self.renamed: dict[str, str] = {}

    def run(self, records: RecordFile, index: int, record: Record | RecordError) -> str:
        """Enter one record into the report; says why it cannot be trained on, or nothing."""
        counts = self.report.sources.setdefault(_source(records, index, record), SourceCounts())
        counts.records += 1
        if isinstance(record, RecordError):
            counts.invalid += 1
            problem = str(record)
        else:
            # All checks run, so that everything is counted; the first problem speaks for the record.
            problems = [problem for check in (self._images, self._length) for problem in check(record, counts)]
            problem = str(name_record(records.path, index, record.id, problems[0])) if problems else ""
        counts.bad += bool(problem)
        return problem

    def look_up_images(self, block: list[Record | RecordError], pool: ThreadPoolExecutor) -> None:
        """Find the state of all images of some records, once each."""
        names = dict.fromkeys(name for record in block if isinstance(record, Record) for name in record.images)
        unseen = [name for name in names if name not in self.states]
        for name, state, other in pool.map(self._look_up, unseen):
            self.states[name] = state
            if other:
                self.renamed[name] = other

    def _look_up(self, name: str) -> tuple[str, tuple[ImageState, str], str | None]:
        folder = self.report.image_folder
        state = inspect_image(folder, name, self.decode)
        is_lost = self.report.on_missing == "resolve" and state[0] is not ImageState.GOOD
        return name, state, find_other_extension(folder, name) if is_lost else None

    def _images(self, record: Record, counts: SourceCounts) -> Iterator[str]:
        for name in record.images:
            state, reason = self.states[name]
            counts.images += 1
            if name in self.renamed:
                counts.resolved += 1
            elif state is not ImageState.GOOD:
                setattr(counts, state.value, getattr(counts, state.value) + 1)
                yield reason

    def _length(self, record: Record, _: SourceCounts) -> Iterator[str]:
        """Measure a record that could be too long, and every so many-th of the others."""
        lengths, meter = self.report.lengths, self.meter
        if lengths is None or meter is None:
            return
        lengths.records += 1
        limit, is_sampled = lengths.model_max_length, record.index % self.step == 0
        if not is_sampled and not meter.may_exceed(record):
            return
        try:
            total, trained = meter.measure(record)
            lengths.longest = max(lengths.longest, total)
        except DataError as error:
            total, trained = limit + 1, 0
            yield str(error)
        else:
            if not trained:
                yield f"no answer lies within {limit} tokens; one must. Raise model_max_length or drop the record."
        lengths.truncated += total > limit
        lengths.unlabelled += trained == 0
        if is_sampled:
            lengths.add_to_histogram(total)


def _source(records: RecordFile, index: int, record: Record | RecordError) -> str:
    if isinstance(record, Record):
        return record.source
    try:
        return source_of(image_names(records.raw(index)))
    except DataError:
        return UNREADABLE


def _judge_lengths(report: DataReport, allow_truncation: bool) -> None:
    """Say whether too many records are cut."""
    counts = report.lengths
    if counts is None or counts.truncated_ratio <= WARN_TRUNCATED:
        return
    share = (
        f"{counts.truncated_ratio:.1%} of the records are longer than {counts.model_max_length:,} tokens, images "
        "included, and would be cut"
    )
    if counts.truncated_ratio > MAX_TRUNCATED and not allow_truncation:
        remedy = "Raise model_max_length, or set allow_truncation."
        report.too_much.append(f"{share}; at most {MAX_TRUNCATED:.0%} may be. {remedy}")
    else:
        report.warnings.append(f"{share}; raise model_max_length to keep them whole.")


def _write_output(
    report: DataReport,
    records: RecordFile,
    is_good: np.ndarray,
    renamed: dict[str, str],
    output: Path,
    overwrite: bool,
    command: str,
) -> None:
    """Write the file without bad records, or with images named as they are."""
    is_drop = report.on_missing == "drop"
    indices = np.flatnonzero(is_good) if is_drop else np.arange(len(records))
    if not len(indices):
        raise DataError(
            f"{report.data_path}: no record is left after dropping {report.num_bad:,}; at least one is needed. "
            f"Check the image folder {report.image_folder}."
        )

    def rewrite(index: int, text: bytes) -> bytes:
        try:
            raw = records.raw(index)
            names = image_names(raw)
        except DataError:
            return text
        if not any(name in renamed for name in names):
            return text
        new = [renamed.get(name, name) for name in names]
        return to_json({**raw, "image": new if isinstance(raw["image"], list) else new[0]})

    settings = {"on_missing": report.on_missing, "image_folder": str(report.image_folder)}
    keys = [str(index) for index in indices.tolist()]
    manifest = make_manifest(records, sha256_of(records.path), keys, settings, command) | {
        "before": {name: counts.records for name, counts in report.sources.items()},
        "after": {name: c.records - (c.bad if is_drop else 0) for name, c in report.sources.items()},
        "renamed_images": {name: counts.resolved for name, counts in report.sources.items()},
    }
    write_outputs([OutputFile(output, indices, manifest)], records, overwrite, rewrite if renamed else None)
    report.output, report.num_output = output, len(indices)


def _write_missing_list(report: DataReport, path: Path) -> None:
    """List the bad images, unless that would replace a file of the user's."""
    if not report.bad_images and not path.exists():
        return
    if path.exists():
        if os.path.samefile(path, report.data_path):
            raise DataError(f"{path} is the data itself; another file is needed for the list. Name another.")
        with open(path, encoding="utf-8", errors="replace") as handle:
            if not all(_OWN_LIST.fullmatch(line) for line in handle):
                if report.bad_images:
                    report.warnings.append(f"{path} is no list of this check and is kept; bad images are not listed.")
                return
    try:
        with atomic_write(path) as unfinished:
            lines = (f"{name}\t{state.value}\n" for name, state in report.bad_images.items())
            unfinished.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise DataError(
            f"{len(report.bad_images):,} images are missing or bad, and the list {path} cannot be written "
            f"({error.strerror}); a writable place is needed. Name another."
        ) from error
    report.missing_list = path if report.bad_images else None


# ---- what a file consists of, without its images ---------------------------------------------------------------------

STATS = ("images", "turns", "question words", "answer words")
"""What is counted of every record; image tags are no words."""


def collect_stats(
    data_path: str | Path, progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, np.ndarray], int]:
    """Count images, turns and words of every record; images are not looked at.

    Args:
        data_path: JSON array or JSON Lines file of records.
        progress: Called now and then with (records done, records).

    Returns:
        For each source, sorted by name, a row of ``STATS`` per record; and the number of records that break the format.

    Raises:
        DataError: If the file cannot be read at all.
    """
    records, rows = RecordFile(data_path), dict[str, list[tuple[int, ...]]]()
    for index in range(len(records)):
        record = _read(records, index)
        if isinstance(record, Record):
            questions = " ".join(turn.question for turn in record.turns).replace(DEFAULT_IMAGE_TOKEN, " ")
            answers = " ".join(turn.answer for turn in record.turns)
            row = (len(record.images), len(record.turns), len(questions.split()), len(answers.split()))
            rows.setdefault(record.source, []).append(row)
        if progress and (index % _BLOCK == _BLOCK - 1 or index + 1 == len(records)):
            progress(index + 1, len(records))
    return {name: np.array(rows[name]) for name in sorted(rows)}, len(records) - sum(map(len, rows.values()))
