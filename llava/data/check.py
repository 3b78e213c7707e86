"""The check of training data that runs before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.conversation import conv_templates
from llava.data.data_report import MAX_TRUNCATED, WARN_TRUNCATED, DataReport, LengthCounts, SourceCounts
from llava.data.derived import DerivedFile, check_target, describe, sha256_of, to_json, write_derived
from llava.data.image_files import ImageState, find_other_extension, inspect_image
from llava.data.json_index import DataError
from llava.data.lengths import LengthMeter
from llava.data.records import Record, RecordError, RecordFile, image_names, source_of

__all__ = ["DataError", "DataReport", "LengthCounts", "SourceCounts", "check_data"]

ON_MISSING = ("error", "drop", "resolve")
UNREADABLE = "unreadable"
_BLOCK = 1024


@dataclass(frozen=True)
class _Finding:
    """One record as read, or why it cannot be."""

    record: Record | None
    source: str
    problem: str = ""


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
    num_threads: int = 16,
    meter: LengthMeter | None = None,
    allow_truncation: bool = False,
    num_sampled: int = 2000,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at every record and every image that training would read.

    Args:
        data_path: JSON array or JSON Lines file of records; never touched.
        image_folder: Folder that image names are relative to.
        conv_template: Conversation template of the training; checked to be a known one.
        decode: Whether to decode every image too (minutes to hours) instead of looking at its size only.
        on_missing: ``error`` only reports; ``drop`` writes a file without the records that cannot be trained on;
            ``resolve`` writes a file in which images saved under another ending are named as they are.
        output: File for ``drop`` and ``resolve``; ``STEM.drop.SUFFIX`` beside the input if None.
        overwrite: Whether other content at ``output`` may be replaced.
        command: Command line to put into the manifest of ``output``.
        missing_list: Where to list bad images, one ``name TAB state`` per line; ``missing_images.txt`` beside the
            derived file or the input if None. An older list there is replaced, emptied if nothing is bad.
        max_shown: Most findings to keep as sentences.
        num_threads: Threads that look at images.
        meter: Measures lengths; every record that could be too long is measured. One without a trained token within
            the maximum, or whose image does not fit, cannot be trained on.
        allow_truncation: Whether more than a fifth of the records may be cut.
        num_sampled: Records that are measured in any case, for the histogram of lengths.
        progress: Called after each block with (records done, records).

    Returns:
        Counts per source, the first findings, every bad image.

    Raises:
        DataError: If the data cannot be read at all, an argument is wrong, or nothing would be left after ``drop``.
    """
    data_path, image_folder = Path(data_path), Path(image_folder)
    _check_arguments(image_folder, conv_template, on_missing, output)
    records = RecordFile(data_path)
    output = Path(output or data_path.with_name(f"{data_path.stem}.{on_missing}{data_path.suffix}"))
    if on_missing != "error":
        check_target(output, data_path)
    report = DataReport(data_path, image_folder, on_missing)
    if meter is not None:
        report.lengths = LengthCounts(meter.max_length)
    measure = _Measuring(meter, max(1, len(records) // max(1, num_sampled)))
    states: dict[str, tuple[ImageState, str]] = {}
    renamed: dict[str, str] = {}
    is_good = np.ones(len(records), dtype=bool)
    with ThreadPoolExecutor(max(1, num_threads)) as pool:

        def look(name: str) -> tuple[tuple[ImageState, str], str | None]:
            found = inspect_image(image_folder, name, decode)
            is_lost = on_missing == "resolve" and found[0] is not ImageState.GOOD
            return found, find_other_extension(image_folder, name) if is_lost else None

        for start in range(0, len(records), _BLOCK):
            block = [_read(records, index) for index in range(start, min(start + _BLOCK, len(records)))]
            names = dict.fromkeys(name for item in block if item.record for name in item.record.images)
            unseen = [name for name in names if name not in states]
            for name, (state, other) in zip(unseen, pool.map(look, unseen), strict=True):
                states[name] = state
                if other:
                    renamed[name] = other
            for offset, item in enumerate(block):
                is_good[start + offset] = _count(report, item, states, renamed, measure, max_shown)
            if progress:
                progress(min(start + _BLOCK, len(records)), len(records))
    report.sources = dict(sorted(report.sources.items()))
    _judge_lengths(report, allow_truncation)
    report.bad_images = {
        name: state for name, (state, _) in states.items() if state is not ImageState.GOOD and name not in renamed
    }
    if on_missing != "error":
        _write_output(report, records, is_good, renamed, output, overwrite, command)
    _write_missing_list(report, missing_list)
    return report


def _check_arguments(
    image_folder: Path,
    conv_template: str | None,
    on_missing: str,
    output: str | Path | None,
) -> None:
    if conv_template is not None and conv_template not in conv_templates:
        known = ", ".join(sorted(conv_templates))
        raise DataError(f"Conversation template '{conv_template}' is unknown; {known} are known. Choose one of them.")
    if on_missing not in ON_MISSING:
        raise DataError(
            f"on_missing '{on_missing}' is unknown; {', '.join(ON_MISSING)} are allowed. Choose one of them."
        )
    if output is not None and on_missing == "error":
        raise DataError(
            "An output was named, but on_missing='error' writes none; name it with 'drop' or 'resolve' only."
        )
    if not image_folder.is_dir():
        raise DataError(
            f"Image folder {image_folder} is not a folder; it must be. Check the path or download the images."
        )


def _read(records: RecordFile, index: int) -> _Finding:
    """Read one record; a bad one becomes a finding."""
    try:
        record = records[index]
    except RecordError as error:
        return _Finding(None, _source_of_bad(records, index), str(error))
    return _Finding(record, record.source)


def _source_of_bad(records: RecordFile, index: int) -> str:
    try:
        return source_of(image_names(records.raw(index)))
    except DataError:
        return UNREADABLE


def _count(
    report: DataReport,
    item: _Finding,
    states: dict[str, tuple[ImageState, str]],
    renamed: dict[str, str],
    measure: _Measuring,
    max_shown: int,
) -> bool:
    """Enter one record into the report; False if it cannot be trained on."""
    counts = report.sources.setdefault(item.source, SourceCounts())
    counts.records += 1
    problem = item.problem
    if item.record is None:
        counts.invalid += 1
    else:
        for name in item.record.images:
            state, reason = states[name]
            counts.images += 1
            if name in renamed:
                counts.resolved += 1
            elif state is not ImageState.GOOD:
                setattr(counts, state.value, getattr(counts, state.value) + 1)
                problem = f"{report.data_path}: record {item.record.index} (id {item.record.id!r}): {reason}"
        if report.lengths is not None:
            unfit = measure(report.lengths, item.record)
            problem = problem or (
                unfit and f"{report.data_path}: record {item.record.index} (id {item.record.id!r}): {unfit}"
            )
    if problem:
        counts.bad += 1
        report.num_bad += 1
        if len(report.errors) < max_shown:
            report.errors.append(problem)
    return not problem


@dataclass(frozen=True)
class _Measuring:
    """Measures the records that could be too long, and every so many-th of the others."""

    meter: LengthMeter | None
    step: int

    def __call__(self, counts: LengthCounts, record: Record) -> str:
        """Count the length of one record; says why it does not fit, or nothing."""
        counts.records += 1
        is_sampled = record.index % self.step == 0
        if not is_sampled and not self.meter.may_exceed(record):
            return ""
        limit = counts.model_max_length
        try:
            total, trained = self.meter.measure(record)
        except DataError as error:
            counts.truncated += 1
            counts.unlabelled += 1
            if is_sampled:
                counts.add_to_histogram(limit + 1)
            return str(error)
        counts.truncated += total > limit
        counts.unlabelled += trained == 0
        counts.longest = max(counts.longest, total)
        if is_sampled:
            counts.add_to_histogram(total)
        if trained:
            return ""
        return f"no answer lies within {limit} tokens; one trained token is needed. Raise model_max_length or drop it."


def _judge_lengths(report: DataReport, allow_truncation: bool) -> None:
    """Say whether too many records are cut."""
    counts = report.lengths
    if counts is None or counts.truncated_ratio <= WARN_TRUNCATED:
        return
    found = (
        f"{counts.truncated_ratio:.1%} of the records are longer than {counts.model_max_length:,} tokens, images "
        "included, and would be cut"
    )
    if counts.truncated_ratio > MAX_TRUNCATED and not allow_truncation:
        report.too_much.append(
            f"{found}; at most {MAX_TRUNCATED:.0%} may be. Raise model_max_length, or set allow_truncation."
        )
    else:
        report.warnings.append(f"{found}; raise model_max_length to keep them whole.")


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
    manifest = describe(records, sha256_of(records.path), keys, settings, command)
    manifest["before"] = {name: counts.records for name, counts in report.sources.items()}
    manifest["after"] = {name: c.records - (c.bad if is_drop else 0) for name, c in report.sources.items()}
    manifest["renamed_images"] = {name: counts.resolved for name, counts in report.sources.items()}
    write_derived([DerivedFile(output, indices, manifest)], records, overwrite, rewrite if renamed else None)
    report.output, report.num_output = output, len(indices)


def _write_missing_list(report: DataReport, path: str | Path | None) -> None:
    """List the bad images, all or none."""
    path = Path(path or (report.output or report.data_path).parent / "missing_images.txt")
    if not report.bad_images and not path.exists():
        return
    if path.exists() and os.path.samefile(path, report.data_path):
        raise DataError(f"{path} is the data itself; another file is needed for the list. Name another.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as handle:
            handle.writelines(f"{name}\t{state.value}\n" for name, state in report.bad_images.items())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{len(report.bad_images):,} images are missing or bad, and the list {path} cannot be written "
            f"({error.strerror}); a writable place is needed. Name another."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    report.missing_list = path if report.bad_images else None
