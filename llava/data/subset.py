"""Subsets of a record file: which records are drawn, and files of them with a manifest that says how they came about.

The same seed draws the same records, and a smaller share is contained in a larger one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.images import ImageState, inspect_image
from llava.data.records import TEXT_SOURCE, DataError, RecordFile, check_choice, image_names, name_record, source_of
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
        check_choice("Mode", self.mode, MODES)
        check_choice("Stratum", self.stratify, STRATA)
        most, folder, names = self.max_per_source, self.require_images, [name for name, _ in self.split]
        total = math.fsum(ratio for _, ratio in self.split)
        checks = [
            (
                0 <= self.keep_ratio <= 1,
                f"Keep ratio {self.keep_ratio} is out of range; 0 to 1 is allowed. Half is 0.5.",
            ),
            (
                most is None or most >= 1,
                f"Maximum per source {most} is too small; 1 or more is. Exclude a source instead.",
            ),
            (
                folder is None or Path(folder).is_dir(),
                f"{folder} is not a folder; the image folder is needed. Correct it.",
            ),
            (
                not self.split or self.mode == "random",
                "A split in mode modulo; only mode random draws one. Drop one of them.",
            ),
        ]
        for name, ratio in self.split:
            is_plain = bool(name) and not _FORBIDDEN_IN_NAMES & set(name)
            allowed = "letters, digits, '-' and '_' are allowed. Rename the part."
            checks += [
                (is_plain, f"Part name {name!r} cannot become part of a file name; {allowed}"),
                (0 < ratio <= 1, f"Part '{name}' has ratio {ratio}; above 0 up to 1 is allowed. Correct the ratio."),
                (names.count(name) == 1, f"Part '{name}' is named twice; each needs its own name. Rename one."),
            ]
        checks += [
            (total <= 1 + 1e-9, f"The parts sum to {total:g}; at most 1 is allowed, being disjoint. Shrink them.")
        ]
        for is_right, problem in checks:
            if not is_right:
                raise DataError(problem)

    def as_manifest(self) -> dict[str, Any]:
        """Give the settings that decide the result, as JSON values."""
        values = {**asdict(self), "exclude_sources": sorted({*self.exclude_sources}), "split": dict(self.split) or None}
        values["keep_ratio"] = None if self.split else self.keep_ratio
        without_effect = ("seed", "stratify") if self.mode == "modulo" else ()
        return {name: value for name, value in values.items() if name not in without_effect}


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
    unless the ratio is 0.

    Args:
        input_path: JSON array or JSON Lines file; never touched.
        output_path: File to write; for a split, ``STEM.PART.SUFFIX`` beside it.
        settings: Which records.
        command: Command line to put into the manifest.
        overwrite: Whether other content at the output may be replaced.
        progress: Called now and then with (records read, records).

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
    for item in map(str.strip, text.split(",")):
        name, _, ratio = item.partition("=")
        try:
            parts.append((name.strip(), float(ratio)))
        except ValueError:
            example = "such as router=0.067,adapter=0.3"
            raise DataError(f"Split item {item!r} is not NAME=RATIO; {example}. Correct the item.") from None
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
            key = f"{settings.seed}\t{_key(index, raw)}".encode("utf-8", "surrogatepass")
            self.order[index] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
            if settings.require_images is not None:
                states = (inspect_image(settings.require_images, name)[0] for name in images)
                self.is_eligible[index] = all(state is ImageState.GOOD for state in states)
            if progress and (index % 1000 == 999 or index + 1 == total):
                progress(index + 1, total)
        for name in settings.exclude_sources:
            if name not in names:
                known = ", ".join(sorted(names))
                raise DataError(f"Source '{name}' is not in {records.path}; {known} are there. Name one of these.")
            self.is_eligible &= self.source != names[name]
        self.names = list(names)  # sources in order of first appearance
        if not self.is_eligible.any():
            raise DataError(
                f"No record of {records.path} is left after exclusions; at least one is needed. "
                "Exclude fewer sources, or check the image folder."
            )

    def counts(self, indices: np.ndarray) -> dict[str, int]:
        """Number of these records per source, sorted by name, 0 included."""
        numbers = np.bincount(self.source[indices], minlength=len(self.names)).tolist()
        return dict(sorted(zip(self.names, numbers, strict=True)))


def _key(index: int, raw: dict) -> str:
    """Name a record uniquely: ids repeat in LLaVA's mixture, indices do not."""
    return f"{index}\t{raw.get('id')}"


def _select(headers: _Headers, settings: SubsetSettings) -> dict[str, np.ndarray]:
    """Give the records of each part, ascending; the one part of an undivided subset has the name ''."""
    chosen: dict[str, list[np.ndarray]] = {name: [] for name, _ in settings.split or (("", 1.0),)}
    if settings.mode == "modulo":
        indices = np.flatnonzero(headers.is_eligible)
        chosen[""] = [indices[indices % 100 < round(settings.keep_ratio * 100, 9)]]
    else:
        is_text = np.array([name == TEXT_SOURCE for name in headers.names])[headers.source]
        strata = {"source": headers.source, "modality": is_text, "none": np.zeros_like(is_text)}[settings.stratify]
        ranked = np.argsort(headers.order, kind="stable")
        ranked = ranked[headers.is_eligible[ranked]]
        ratios = [ratio for _, ratio in settings.split] or [settings.keep_ratio]
        for stratum in np.unique(strata[ranked]):
            members = ranked[strata[ranked] == stratum]
            # What lies behind the last bound is in no part.
            for pieces, piece in zip(
                chosen.values(), np.split(members, _bounds(len(members), ratios)[1:]), strict=False
            ):
                pieces.append(piece)
    return {
        name: np.sort(_cap(np.concatenate(pieces), headers, settings.max_per_source)) for name, pieces in chosen.items()
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
    empty = [name for name, count in eligible.items() if count and not part.counts[name]]
    if not part.num_records:
        return [f"{part.path} holds no record; training on it is impossible."]
    warnings = {
        "no text-only record; the model may lose language ability.": not part.counts.get(TEXT_SOURCE),
        f"no record of {', '.join(empty)}: too few for this ratio or these parts.": bool(empty),
        f"{part.num_records} records, less than one global batch of {SMALLEST_USEFUL}.": part.num_records
        < SMALLEST_USEFUL,
    }
    return [f"{part.path} holds {problem}" for problem, is_there in warnings.items() if is_there]


# ---- files with manifests --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OutputFile:
    """One file to make of the records of another."""

    path: Path  # where; ``.jsonl`` gives JSON Lines, ``.json`` an array, anything else the form of the input
    indices: np.ndarray  # records to take, ascending, int64
    manifest: dict[str, Any]  # how the file comes about; two files with equal manifests are taken to be the same

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is."""
        return Path(f"{self.path}.manifest.json")

    def is_there(self) -> bool:
        """Whether the very same result is at the target already."""
        try:
            old = json.loads(self.manifest_path.read_text(encoding="utf-8"))
            differing = {key for key in {*old, *self.manifest} if old.get(key, ...) != self.manifest.get(key, ...)}
            return differing <= {*_VOLATILE} and old["output_sha256"] == sha256_of(self.path)
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return False


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
    for target in (path, Path(f"{path}.manifest.json")):
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
    todo = [file for file in files if not file.is_there()]
    targets = [path for file in todo for path in (file.path, file.manifest_path)]
    taken = next((path for path in targets if path.exists()), None)
    if taken and not overwrite:
        raise DataError(
            f"{taken} exists and is not the result of this command; a new name is needed. "
            "Choose another output, remove it, or add --overwrite."
        )
    try:
        with atomic_write_all(targets) as unfinished:
            for file, data, manifest in zip(todo, unfinished[::2], unfinished[1::2], strict=True):
                _write_records(data, file, source, rewrite)
                values = {**file.manifest, "output": file.path.name, "output_sha256": sha256_of(data)}
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


def _write_records(
    path: Path, file: OutputFile, source: RecordFile, rewrite: Callable[[int, bytes], bytes] | None
) -> None:
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
