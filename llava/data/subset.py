"""Subsets of a record file: which records are drawn, and files of them with a manifest that says how they came about.

The same seed draws the same records, and a smaller share is contained in a larger one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.images import ImageState, inspect_image
from llava.data.records import TEXT_SOURCE, DataError, RecordFile, image_names, name_record, source_of
from llava.files import atomic_write_all

MODES = ("random", "modulo")
STRATA = ("source", "modality", "none")
SMALLEST_USEFUL = 128  # one global batch of LLaVA-1.5's SFT recipe
_FORBIDDEN_IN_NAMES = set("/\\\0 .")
_VOLATILE = ("input", "command", "version", "output", "output_sha256")  # may differ between two equal results


@dataclass(frozen=True)
class SubsetSettings:
    """Which records to take."""

    keep_ratio: float = 0.5  # share of the eligible records in [0, 1]; ignored where ``split`` is given
    seed: int = 42  # any whole number; with equal seeds a smaller ratio is contained in a larger one
    mode: str = "random"  # ``random``, or ``modulo`` for the published rule ``index % 100 < 100 * keep_ratio``
    # draw the same share from each ``source``, each ``modality`` (with image or without), or the whole
    stratify: str = "source"
    exclude_sources: tuple[str, ...] = ()  # sources to leave out before anything else
    require_images: str | None = None  # image folder; records whose images are missing or empty there are left out
    max_per_source: int | None = None  # most records of one source
    split: tuple[tuple[str, float], ...] = ()  # names and ratios of disjoint parts, instead of one output

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn. Raises DataError."""
        for value, known, what in ((self.mode, MODES, "Mode"), (self.stratify, STRATA, "Stratum")):
            if value not in known:
                raise DataError(f"{what} '{value}' is unknown; {', '.join(known)} are allowed. Choose one of them.")
        if not 0 <= self.keep_ratio <= 1:
            raise DataError(f"Keep ratio {self.keep_ratio} is out of range; 0 to 1 is allowed. Write half as 0.5.")
        if self.max_per_source is not None and self.max_per_source < 1:
            raise DataError(
                f"Maximum per source {self.max_per_source} is too small; 1 or more is allowed. "
                "To leave a source out, exclude it."
            )
        if self.require_images is not None and not Path(self.require_images).is_dir():
            raise DataError(f"{self.require_images} is not a folder; the image folder is needed. Check the path.")
        if self.split and self.mode == "modulo":
            raise DataError("A split was asked for in mode modulo; only mode random draws one. Drop one of the two.")
        names = [name for name, _ in self.split]
        for name, ratio in self.split:
            if not name or _FORBIDDEN_IN_NAMES & set(name):
                raise DataError(
                    f"Part name {name!r} cannot become part of a file name; letters, digits, '-' and '_' are allowed. "
                    "Rename the part."
                )
            if not 0 < ratio <= 1:
                raise DataError(f"Part '{name}' has ratio {ratio}; above 0 up to 1 is allowed. Correct the ratio.")
            if names.count(name) > 1:
                raise DataError(f"Part '{name}' is named twice; each part needs its own name. Rename one.")
        total = math.fsum(ratio for _, ratio in self.split)
        if total > 1 + 1e-9:
            raise DataError(f"The parts sum to {total:g}; at most 1 is allowed, being disjoint. Make them smaller.")

    def as_manifest(self) -> dict[str, Any]:
        """Give the settings that decide the result, as JSON values."""
        settings: dict[str, Any] = {"mode": self.mode}
        if self.mode == "random":
            settings |= {"seed": self.seed, "stratify": self.stratify}
        return settings | {
            "keep_ratio": None if self.split else self.keep_ratio,
            "exclude_sources": sorted(set(self.exclude_sources)),
            "require_images": self.require_images,
            "max_per_source": self.max_per_source,
            "split": dict(self.split) or None,
        }


@dataclass(frozen=True)
class SubsetPart:
    """One written file."""

    path: Path  # where it is
    counts: dict[str, int]  # records taken per source, 0 included
    was_there: bool  # whether the same result was there already, so that nothing was written

    @property
    def num_records(self) -> int:
        """Records in the file."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class SubsetResult:
    """What was drawn: records per source in the input, one part per file, and what is probably a mistake."""

    before: dict[str, int]
    parts: tuple[SubsetPart, ...]
    warnings: tuple[str, ...] = ()


def draw_subset(
    input_path: str | Path,
    output_path: str | Path,
    settings: SubsetSettings,
    command: str = "",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SubsetResult:
    """Draw records and write them with a manifest.

    Records of a stratum are ordered by a hash of (seed, index, id) and the first share of them is taken, so equal
    seeds give equal files and nested ratios give nested files. Every non-empty stratum keeps at least one record
    unless the ratio is 0. Only byte offsets and 13 bytes per record are held in memory.

    Args:
        input_path: JSON array or JSON Lines file; never touched.
        output_path: File to write; for a split, ``STEM.PART.SUFFIX`` beside it.
        settings: Which records.
        command: Command line to put into the manifest.
        overwrite: Whether other content at the output may be replaced.
        progress: Called now and then with (records read, records).

    Returns:
        Counts before and after, with warnings.

    Raises:
        DataError: If input, settings or output cannot be used; nothing is left behind then.
    """
    source, output = RecordFile(input_path), Path(output_path)
    if output.is_dir():  # before a part's name is added to it
        raise DataError(f"{output} is a folder; the name of a file is needed. Add a file name to the output.")
    paths = {name: output.with_name(f"{output.stem}.{name}{output.suffix}") for name, _ in settings.split}
    paths = paths or {"": output}
    for path in paths.values():
        check_output_path(path, source.path)
    headers = _Headers(source, settings, progress)
    before, input_sha256, files = headers.counts(np.arange(len(source))), sha256_of(source.path), []
    for name, indices in _select(headers, settings).items():
        keys = [_key(index, source.raw(index)) for index in indices.tolist()]
        manifest = make_manifest(source, input_sha256, keys, settings.as_manifest(), command)
        manifest |= {"part": name or None, "before": before, "after": headers.counts(indices)}
        files.append(OutputFile(paths[name], indices, manifest))
    written = write_outputs(files, source, overwrite)
    parts = tuple(
        SubsetPart(file.path, file.manifest["after"], not is_new) for file, is_new in zip(files, written, strict=True)
    )
    eligible = headers.counts(np.flatnonzero(headers.is_eligible))
    return SubsetResult(before, parts, tuple(warning for part in parts for warning in _warnings(part, eligible)))


def parse_split(text: str) -> tuple[tuple[str, float], ...]:
    """Read names with ratios. Raises DataError if an item is not NAME=RATIO.

    >>> parse_split("router=0.067, adapter=0.3")
    (('router', 0.067), ('adapter', 0.3))
    """
    parts = []
    for item in text.split(","):
        name, _, ratio = item.strip().partition("=")
        try:
            parts.append((name.strip(), float(ratio)))
        except ValueError:
            raise DataError(
                f"Split item {item.strip()!r} is not NAME=RATIO; such as router=0.067,adapter=0.3. Correct the item."
            ) from None
    return tuple(parts)


# ---- which records ---------------------------------------------------------------------------------------------------


class _Headers:
    """What selection needs of every record, N entries each."""

    def __init__(
        self, records: RecordFile, settings: SubsetSettings, progress: Callable[[int, int], None] | None
    ) -> None:
        total, names = len(records), dict[str, int]()
        self.source = np.empty(total, np.int32)  # position in ``names``
        self.order = np.empty(total, np.uint64)  # pseudo-random rank
        self.is_eligible = np.ones(total, bool)
        for index in range(total):
            raw = records.raw(index)
            try:
                images = image_names(raw)
            except DataError as problem:
                raise name_record(records.path, index, raw.get("id"), problem) from None
            self.source[index] = names.setdefault(source_of(images), len(names))
            self.order[index] = _rank_key(settings.seed, _key(index, raw))
            if settings.require_images is not None:
                states = (inspect_image(settings.require_images, name)[0] for name in images)
                self.is_eligible[index] = all(state is ImageState.GOOD for state in states)
            if progress and (index % 1000 == 999 or index + 1 == total):
                progress(index + 1, total)
        unknown = sorted(set(settings.exclude_sources) - set(names))
        if unknown:
            known = ", ".join(sorted(names))
            raise DataError(f"Source '{unknown[0]}' is not in {records.path}; {known} are there. Name one of these.")
        self.names = list(names)  # sources in order of first appearance
        self.is_eligible &= ~np.isin(self.source, [names[name] for name in settings.exclude_sources])
        if not self.is_eligible.any():
            raise DataError(
                f"No record of {records.path} is left after exclusions; at least one is needed. "
                "Exclude fewer sources, or check the image folder."
            )

    def counts(self, indices: np.ndarray) -> dict[str, int]:
        """Number of these records per source, sorted by name, 0 included."""
        numbers = np.bincount(self.source[indices], minlength=len(self.names)).tolist()
        return dict(sorted(zip(self.names, numbers, strict=True)))

    def strata(self, stratify: str) -> np.ndarray:
        """Stratum of every record."""
        if stratify == "source":
            return self.source
        is_text = np.array([name == TEXT_SOURCE for name in self.names])[self.source]
        return is_text if stratify == "modality" else np.zeros_like(self.source)


def _key(index: int, raw: dict) -> str:
    """Name a record uniquely: ids repeat in LLaVA's mixture, indices do not."""
    return f"{index}\t{raw.get('id')}"


def _rank_key(seed: int, key: str) -> int:
    text = f"{seed}\t{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _select(headers: _Headers, settings: SubsetSettings) -> dict[str, np.ndarray]:
    """Give the records of each part, ascending; the one part of an undivided subset has the name ''."""
    if settings.mode == "modulo":
        indices = np.flatnonzero(headers.is_eligible)
        chosen = {"": [indices[indices % 100 < round(settings.keep_ratio * 100, 9)]]}
    else:
        parts = settings.split or (("", settings.keep_ratio),)
        chosen = {name: [] for name, _ in parts}
        strata = headers.strata(settings.stratify)
        ranked = np.argsort(headers.order, kind="stable")
        ranked = ranked[headers.is_eligible[ranked]]
        for stratum in np.unique(strata[ranked]):
            members = ranked[strata[ranked] == stratum]
            bounds = _bounds(len(members), [ratio for _, ratio in parts])
            for (name, _), start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
                chosen[name].append(members[start:stop])
    return {
        name: np.sort(_cap(np.concatenate(members), headers, settings.max_per_source))
        for name, members in chosen.items()
    }


def _bounds(size: int, ratios: Sequence[float]) -> list[int]:
    """Cut a stratum into consecutive parts, none empty if it is large enough.

    >>> _bounds(10, [0.5])
    [0, 5]
    >>> _bounds(3, [0.01, 0.01])
    [0, 1, 2]
    """
    bounds = [0] + [min(size, math.floor(size * math.fsum(ratios[: n + 1]) + 0.5)) for n in range(len(ratios))]
    positive = [ratio > 0 for ratio in ratios]
    if size >= sum(positive):
        # Forwards every part gets its one record, backwards none is pushed out of the stratum by that.
        for n, is_positive in enumerate(positive):
            bounds[n + 1] = max(bounds[n + 1], bounds[n] + is_positive)
        for n in reversed(range(len(ratios))):
            bounds[n + 1] = min(bounds[n + 1], size - sum(positive[n + 1 :]))
    return bounds


def _cap(chosen: np.ndarray, headers: _Headers, limit: int | None) -> np.ndarray:
    """Keep the first ``limit`` records of each source, in the order given."""
    if limit is None or not len(chosen):
        return chosen
    sources = headers.source[chosen]
    return np.concatenate([chosen[sources == source][:limit] for source in np.unique(sources)])


def _warnings(part: SubsetPart, eligible: dict[str, int]) -> list[str]:
    if not part.num_records:
        return [f"{part.path} holds no record; training on it is impossible."]
    warnings = []
    if not part.counts.get(TEXT_SOURCE):
        warnings.append(f"{part.path} holds no text-only record; the model may lose language ability.")
    empty = [name for name, count in eligible.items() if count and not part.counts[name]]
    if empty:
        warnings.append(f"{part.path} holds no record of {', '.join(empty)}: too few for this ratio or these parts.")
    if part.num_records < SMALLEST_USEFUL:
        batch = f"less than one global batch of {SMALLEST_USEFUL}"
        warnings.append(f"{part.path} holds {part.num_records} records, {batch}.")
    return warnings


# ---- files with manifests --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OutputFile:
    """One file to make of the records of another."""

    path: Path  # where; ``.jsonl`` gives JSON Lines, ``.json`` an array, anything else the form of the input
    indices: np.ndarray  # records to take, ascending, int64
    manifest: dict[str, Any]  # how the file comes about; two files with equal manifests are taken to be the same


def make_manifest(
    source: RecordFile, input_sha256: str, keys: Sequence[str], settings: dict[str, Any], command: str
) -> dict[str, Any]:
    """Say how a file comes about: of which ``source``, by which ``settings``, and by which ``command`` again.

    ``keys`` name the records it holds, one string each, even where ids repeat.
    """
    try:
        product = version("fuzzyroe")
    except PackageNotFoundError:
        product = "source tree"
    return {
        "version": product,
        "command": command,
        "input": str(source.path),
        "input_sha256": input_sha256,
        "input_records": len(source),
        "settings": settings,
        "records": len(keys),
        "kept_keys_sha256": hashlib.sha256("\n".join(sorted(keys)).encode("utf-8", "surrogatepass")).hexdigest(),
    }


def check_output_path(path: Path, source: Path) -> None:
    """Refuse, before any work is done, a path that is the input, a folder, or in no folder. Raises DataError."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; the name of a file is needed. Add a file name to the output.")
    if not path.parent.is_dir():
        raise DataError(f"The output folder {path.parent} does not exist; it must. Create it: mkdir -p {path.parent}")
    for target in (path, _manifest_path(path)):
        if target.exists() and os.path.samefile(target, source):
            raise DataError(f"{target} is the input itself; another file is needed. Choose another output name.")


def write_outputs(
    files: Sequence[OutputFile],
    source: RecordFile,
    overwrite: bool = False,
    rewrite: Callable[[int, bytes], bytes] | None = None,
) -> list[bool]:
    """Write record files and their manifests; either all of them appear or none.

    Args:
        files: What to write.
        source: Where the records come from, copied byte for byte, one at a time; never touched.
        overwrite: Whether other content at a target may be replaced.
        rewrite: Gives the new text of a record from its index and its text.

    Returns:
        For each file, whether it was written; False where the very same result was there already.

    Raises:
        DataError: If a target is the input, exists with other content, or cannot be written; nothing is left behind.
    """
    for file in files:
        check_output_path(file.path, source.path)
    todo = [file for file in files if not _is_there(file)]
    targets = [path for file in todo for path in (file.path, _manifest_path(file.path))]
    taken = next((path for path in targets if path.exists()), None)
    if taken and not overwrite:
        raise DataError(
            f"{taken} exists and is not the result of this command; a new name is needed. "
            "Choose another output, remove it, or add --overwrite."
        )
    try:
        with atomic_write_all(targets) as unfinished:
            for file, data, manifest in zip(todo, unfinished[::2], unfinished[1::2], strict=True):
                digest = _write_records(data, file, source, rewrite)
                values = {**file.manifest, "output": file.path.name, "output_sha256": digest}
                manifest.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"Writing {files[0].path} failed ({error.strerror}); nothing was written. "
            "Make room or choose another folder, then run again."
        ) from error
    return [file in todo for file in files]


def sha256_of(path: str | Path) -> str:
    """Give the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def to_json(obj: dict[str, Any]) -> bytes:
    """Give one object as one line of JSON; half surrogate pairs stay escaped."""
    try:
        return json.dumps(obj, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(obj).encode("ascii")


def _manifest_path(path: Path) -> Path:
    return Path(f"{path}.manifest.json")


def _is_there(file: OutputFile) -> bool:
    """Whether the very same result is at the target already."""

    def stable(manifest: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in manifest.items() if key not in _VOLATILE}

    try:
        old = json.loads(_manifest_path(file.path).read_text(encoding="utf-8"))
        return stable(old) == stable(file.manifest) and old.get("output_sha256") == sha256_of(file.path)
    except (OSError, ValueError, AttributeError):
        return False


def _write_records(
    path: Path, file: OutputFile, source: RecordFile, rewrite: Callable[[int, bytes], bytes] | None
) -> str:
    """Write the records of one file and give its SHA-256."""
    is_lines = {".jsonl": True, ".json": False}.get(file.path.suffix.lower(), source.is_lines)
    opening, separator, closing = (b"", b"\n", b"\n") if is_lines else (b"[\n", b",\n", b"\n]\n")
    with open(path, "wb") as handle:
        handle.write(opening)
        for number, index in enumerate(file.indices.tolist()):
            text = source.raw_bytes(index)
            text = rewrite(index, text) if rewrite else text
            if is_lines and (b"\n" in text or b"\r" in text):
                text = to_json(source.raw(index))
            handle.write(separator + text if number else text)
        handle.write(closing if len(file.indices) or not is_lines else b"")
    return sha256_of(path)
