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
from llava.data.records import (
    DataError,
    Record,
    RecordError,
    RecordFile,
    check_choice,
    image_names,
    name_record,
    source_of,
)
from llava.data.subset import OutputFile, check_output_path, make_manifest, sha256_of, to_json, write_outputs
from llava.files import atomic_write

ON_MISSING = ("error", "drop", "resolve")
MAX_TRUNCATED, WARN_TRUNCATED = 0.2, 0.01
"""Largest share of records that may be cut without being asked for, and the share from which a warning is given."""
NUM_BINS = 8
"""Parts of the maximum length in the histogram of lengths."""
NUM_THREADS = 16
"""Threads that look at images: most of the time goes into waiting for a disk or a network."""
_BLOCK = 1024
_FOREIGN_TAGS = ("<video>", "<audio>", "<img>")
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
    bad_images: dict[str, ImageState] = field(default_factory=dict)  # all that are missing, empty or corrupt
    lengths: LengthCounts | None = None  # counts of lengths where they were asked for
    too_much: list[str] = field(default_factory=list)  # why the file as a whole cannot be trained on
    warnings: list[str] = field(default_factory=list)  # what works but is probably a mistake
    missing_list: Path | None = None  # file that lists ``bad_images``, None if there is none
    output: Path | None = None  # file that ``on_missing`` wrote, None if there is none
    num_output: int = 0  # records in ``output``

    @property
    def num_records(self) -> int:
        """Records in the file."""
        return sum(counts.records for counts in self.sources.values())

    @property
    def num_bad(self) -> int:
        """Records that cannot be trained on as they stand."""
        return sum(counts.bad for counts in self.sources.values())

    @property
    def is_ok(self) -> bool:
        """Whether every record of ``usable_path`` can be trained on, and the file as a whole."""
        return (not self.num_bad or self.on_missing == "drop") and not self.too_much

    @property
    def usable_path(self) -> Path:
        """The file to train on: the one that ``on_missing`` wrote, where it wrote one."""
        return self.output or self.data_path

    def problems(self) -> list[str]:
        """The verdict on bad records, the first of them, and what is wrong with the file as a whole; one line each."""
        lines = []
        if self.num_bad:
            verdict = "cannot be trained on; none may be. Mend them, or write a file without them: --on-missing drop."
            verdict = "were dropped." if self.on_missing == "drop" else verdict
            where = f" All bad images: {self.missing_list}." if self.missing_list else ""
            more = self.num_bad - len(self.errors)
            lines = [f"{self.num_bad:,} of {self.num_records:,} records {verdict}{where}", *self.errors]
            lines += [f"... and {more:,} more"] if more else []
        return [*lines, *self.too_much]

    def raise_if_bad(self) -> None:
        """Raise DataError with the ``problems`` unless ``is_ok``."""
        if not self.is_ok:
            raise DataError(f"{self.data_path}: " + "\n".join(self.problems()))


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
    if conv_template is not None:
        check_choice("Conversation template", conv_template, sorted(conv_templates))
    check_choice("on_missing", on_missing, ON_MISSING)
    if output is not None and on_missing == "error":
        raise DataError("on_missing='error' writes none, but an output was named; name it with drop or resolve only.")
    if not image_folder.is_dir():
        raise DataError(f"Image folder {image_folder} is not a folder; it must be. Check the path or get the images.")
    records = RecordFile(data_path)
    output = Path(output or data_path.with_name(f"{data_path.stem}.{on_missing}{data_path.suffix}"))
    if on_missing != "error":
        check_output_path(output, data_path)
    report = DataReport(data_path, image_folder, on_missing)
    report.lengths = LengthCounts(meter.max_length) if meter else None
    images: dict[str, _Image] = {}
    is_good, num_foreign, step = np.ones(len(records), dtype=bool), 0, max(1, len(records) // max(1, num_sampled))

    def look_up(name: str) -> _Image:
        state, reason = inspect_image(image_folder, name, decode)
        is_lost = on_missing == "resolve" and state is not ImageState.GOOD
        return _Image(state, reason, find_other_extension(image_folder, name) if is_lost else None)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(records), _BLOCK):
            block = [_read(records, index) for index in range(start, min(start + _BLOCK, len(records)))]
            # Every image once, many at a time.
            names = dict.fromkeys(name for record in block if isinstance(record, Record) for name in record.images)
            unseen = [name for name in names if name not in images]
            images.update(zip(unseen, pool.map(look_up, unseen), strict=True))
            for index, record in enumerate(block, start):
                counts = report.sources.setdefault(_source(records, index, record), SourceCounts())
                counts.records += 1
                if isinstance(record, RecordError):
                    counts.invalid += 1
                    problem = str(record)
                else:
                    # All checks run, so that everything is counted; the first problem speaks for the record.
                    problems = [*_check_images(record, images, counts)]
                    if meter and report.lengths:
                        problems += _check_length(record, meter, report.lengths, index % step == 0)
                    problem = str(name_record(data_path, index, record.id, problems[0])) if problems else ""
                    num_foreign += not record.images and any(
                        tag in turn.question for turn in record.turns for tag in _FOREIGN_TAGS
                    )
                is_good[index] = not problem
                counts.bad += bool(problem)
                if problem and len(report.errors) < max_shown:
                    report.errors.append(problem)
            if progress:
                progress(start + len(block), len(records))
    report.sources = dict(sorted(report.sources.items()))
    renamed = {name: image.other_name for name, image in images.items() if image.other_name}
    bad = {name: image.state for name, image in images.items() if image.state is not ImageState.GOOD}
    report.bad_images = {name: state for name, state in bad.items() if name not in renamed}
    if num_foreign:
        tags = ", ".join(_FOREIGN_TAGS)
        report.warnings.append(f"{num_foreign:,} records without an image hold {tags}; they are trained on as text.")
    _judge_lengths(report, allow_truncation)
    if on_missing != "error":
        _write_output(report, records, is_good, renamed, output, overwrite, command)
    _write_missing_list(report, Path(missing_list or report.usable_path.with_name("missing_images.txt")))
    return report


@dataclass(frozen=True)
class _Image:
    """What was found where a record names an image."""

    state: ImageState
    reason: str  # why it is not good
    other_name: str | None  # the name it is there under, with another extension, where that was asked for


def _read(records: RecordFile, index: int) -> Record | RecordError:
    try:
        return records[index]
    except RecordError as error:
        return error


def _source(records: RecordFile, index: int, record: Record | RecordError) -> str:
    try:
        return record.source if isinstance(record, Record) else source_of(image_names(records.raw(index)))
    except DataError:
        return "unreadable"


def _check_images(record: Record, images: dict[str, _Image], counts: SourceCounts) -> Iterator[str]:
    for image in (images[name] for name in record.images):
        counts.images += 1
        if image.other_name:
            counts.resolved += 1
        elif image.state is not ImageState.GOOD:
            setattr(counts, image.state.value, getattr(counts, image.state.value) + 1)
            yield image.reason


def _check_length(record: Record, meter: LengthMeter, lengths: LengthCounts, is_sampled: bool) -> Iterator[str]:
    """Measure a record that could be too long, and those of the sample."""
    lengths.records += 1
    limit = lengths.model_max_length
    if not is_sampled and not meter.may_exceed(record):
        return
    try:
        total, trained = meter.measure(record)
        lengths.longest = max(lengths.longest, total)
        if not trained:
            yield f"no answer lies within {limit} tokens; one must. Raise model_max_length or drop the record."
    except DataError as error:
        total, trained = limit + 1, 0
        yield str(error)
    lengths.truncated += total > limit
    lengths.unlabelled += trained == 0
    if is_sampled:
        lengths.sampled += 1
        lengths.histogram[min(NUM_BINS, (total - 1) * NUM_BINS // limit)] += 1


def _judge_lengths(report: DataReport, allow_truncation: bool) -> None:
    """Say whether too many records are cut."""
    counts = report.lengths
    if counts is None or counts.truncated_ratio <= WARN_TRUNCATED:
        return
    share = f"{counts.truncated_ratio:.1%} of the records are longer than {counts.model_max_length:,} tokens, images "
    share += "included, and would be cut"
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
        new = [renamed.get(name, name) for name in names]
        if new == [*names]:
            return text
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
    if path.exists():
        if os.path.samefile(path, report.data_path):
            raise DataError(f"{path} is the data itself; another file is needed for the list. Name another.")
        with open(path, encoding="utf-8", errors="replace") as handle:
            is_own = all(_OWN_LIST.fullmatch(line) for line in handle)
        if not is_own and report.bad_images:
            report.warnings.append(f"{path} is no list of this check and is kept; bad images are not listed.")
        if not is_own:
            return
    elif not report.bad_images:
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
