"""A smaller training file drawn from a larger one, the same again from the same seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llava.data.derived import DerivedFile, check_target, describe, sha256_of, write_derived
from llava.data.image_files import ImageState, inspect_image
from llava.data.json_index import DataError
from llava.data.records import TEXT_SOURCE, RecordError, RecordFile, image_names, source_of

MODES = ("random", "modulo")
STRATA = ("source", "modality", "none")
SMALLEST_USEFUL = 128  # one global batch of LLaVA-1.5's SFT recipe
_FORBIDDEN_IN_NAMES = set("/\\\0 .")


@dataclass(frozen=True)
class SubsetSettings:
    """Which records to take.

    Attributes:
        keep_ratio: Share of the eligible records in [0, 1]; ignored where ``split`` is given.
        seed: Any whole number; with equal seeds a smaller ratio is contained in a larger one.
        mode: ``random``, or ``modulo`` for the published rule ``index % 100 < 100 * keep_ratio``.
        stratify: Draw the same share from each ``source``, each ``modality`` (with image or without), or the whole.
        exclude_sources: Sources to leave out before anything else.
        require_images: Image folder; records whose images are missing or empty there are left out.
        max_per_source: Most records of one source.
        split: Names and ratios of disjoint parts, instead of one output.
    """

    keep_ratio: float = 0.5
    seed: int = 42
    mode: str = "random"
    stratify: str = "source"
    exclude_sources: tuple[str, ...] = ()
    require_images: str | None = None
    max_per_source: int | None = None
    split: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DataError(f"Mode '{self.mode}' is unknown; {' or '.join(MODES)} is allowed. Choose one of them.")
        if self.stratify not in STRATA:
            raise DataError(
                f"Stratum '{self.stratify}' is unknown; {', '.join(STRATA)} are allowed. Choose one of them."
            )
        if not 0 <= self.keep_ratio <= 1:
            raise DataError(
                f"Keep ratio {self.keep_ratio} is out of range; 0 to 1 is allowed. Write half of the data as 0.5."
            )
        if self.max_per_source is not None and self.max_per_source < 1:
            raise DataError(
                f"Maximum per source {self.max_per_source} is too small; 1 or more is allowed. "
                "To leave a source out, exclude it."
            )
        if self.require_images is not None and not Path(self.require_images).is_dir():
            raise DataError(f"{self.require_images} is not a folder; the image folder is needed. Check the path.")
        if self.split and self.mode == "modulo":
            raise DataError(
                "A split was asked for in mode modulo; it is drawn in mode random only. Drop one of the two."
            )
        self._check_split()

    def _check_split(self) -> None:
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
            raise DataError(
                f"The parts sum to {total:g}; at most 1 is allowed, as parts are disjoint. Make them smaller."
            )

    def as_manifest(self) -> dict:
        """Give the settings that decide the result, as JSON values."""
        settings = {"mode": self.mode}
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
    """One written file.

    Attributes:
        path: Where it is.
        counts: Records taken per source, 0 included.
        was_there: Whether the same result was there already, so that nothing was written.
    """

    path: Path
    counts: dict[str, int]
    was_there: bool

    @property
    def num_records(self) -> int:
        """Records in the file."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class SubsetResult:
    """What was drawn.

    Attributes:
        before: Records per source in the input.
        parts: One entry per file.
        warnings: What works but is probably a mistake.
    """

    before: dict[str, int]
    parts: tuple[SubsetPart, ...]
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, eq=False)
class _Headers:
    """What selection needs of every record: N entries each."""

    sources: list[str]  # names, in order of first appearance
    source_of: np.ndarray  # position in ``sources``, int32
    order: np.ndarray  # pseudo-random rank key, uint64
    is_eligible: np.ndarray  # bool

    def counts(self, indices: np.ndarray) -> dict[str, int]:
        found = np.bincount(self.source_of[indices], minlength=len(self.sources)).tolist()
        return dict(sorted(zip(self.sources, found, strict=True)))


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
    if output.is_dir():
        raise DataError(f"{output} is a folder; the name of a file is needed. Add a file name to the output.")
    for name, _ in settings.split or (("", None),):
        check_target(_part_path(output, name), source.path)
    headers = _read_headers(source, settings, progress)
    selections = _select(headers, settings)
    input_sha256, files = sha256_of(source.path), []
    for name, indices in selections.items():
        manifest = describe(source, input_sha256, _keys(source, indices), settings.as_manifest(), command)
        manifest |= {"part": name or None, "before": headers.counts(np.arange(len(source)))}
        files.append(DerivedFile(_part_path(output, name), indices, manifest | {"after": headers.counts(indices)}))
    written = write_derived(files, source, overwrite)
    parts = tuple(
        SubsetPart(file.path, headers.counts(file.indices), not is_new)
        for file, is_new in zip(files, written, strict=True)
    )
    before = headers.counts(np.arange(len(source)))
    return SubsetResult(
        before, parts, tuple(_warnings(before, headers.counts(np.flatnonzero(headers.is_eligible)), parts))
    )


def parse_split(text: str) -> tuple[tuple[str, float], ...]:
    """Read ``router=0.067,adapter=0.3`` as names with ratios."""
    parts = []
    for item in text.split(","):
        name, equals, ratio = item.strip().partition("=")
        try:
            parts.append((name.strip(), float(ratio)))
        except ValueError:
            raise DataError(
                f"Split item {item.strip()!r} is not NAME=RATIO; such as router=0.067,adapter=0.3. Correct the item."
            ) from None
    return tuple(parts)


def _read_headers(
    source: RecordFile, settings: SubsetSettings, progress: Callable[[int, int], None] | None
) -> _Headers:
    total = len(source)
    names: dict[str, int] = {}
    source_ids, order, is_eligible = np.empty(total, np.int32), np.empty(total, np.uint64), np.ones(total, bool)
    for index in range(total):
        raw = source.raw(index)
        try:
            images = image_names(raw)
        except DataError as error:
            raise RecordError(f"{source.path}: record {index} (id {raw.get('id')!r}): {error}") from None
        source_ids[index] = names.setdefault(source_of(images), len(names))
        order[index] = _rank_key(settings.seed, _key(index, raw))
        if settings.require_images is not None:
            is_eligible[index] = all(
                inspect_image(settings.require_images, name)[0] is ImageState.GOOD for name in images
            )
        if progress and (index % 1000 == 999 or index + 1 == total):
            progress(index + 1, total)
    unknown = sorted(set(settings.exclude_sources) - set(names))
    if unknown:
        raise DataError(
            f"Source '{unknown[0]}' is not in {source.path}; {', '.join(sorted(names))} are there. "
            "Exclude one of these or none."
        )
    is_eligible &= ~np.isin(source_ids, [names[name] for name in settings.exclude_sources])
    if not is_eligible.any():
        raise DataError(
            f"No record of {source.path} is left after exclusions; at least one is needed. "
            "Exclude fewer sources, or check the image folder."
        )
    return _Headers(list(names), source_ids, order, is_eligible)


def _key(index: int, raw: dict) -> str:
    """Name a record uniquely: ids repeat in LLaVA's mixture, indices do not."""
    return f"{index}\t{raw.get('id')}"


def _keys(source: RecordFile, indices: np.ndarray) -> list[str]:
    return [_key(index, source.raw(index)) for index in indices.tolist()]


def _rank_key(seed: int, key: str) -> int:
    text = f"{seed}\t{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _select(headers: _Headers, settings: SubsetSettings) -> dict[str, np.ndarray]:
    """Give the records of each part, ascending; the one part of an undivided subset has the name ''."""
    if settings.mode == "modulo":
        indices = np.arange(len(headers.order))
        chosen = indices[headers.is_eligible & (indices % 100 < round(settings.keep_ratio * 100, 9))]
        return {"": np.sort(_cap(chosen, headers, settings.max_per_source))}
    parts = settings.split or (("", settings.keep_ratio),)
    chosen: dict[str, list[np.ndarray]] = {name: [] for name, _ in parts}
    strata = _strata(headers, settings.stratify)
    ranked = np.lexsort((np.arange(len(headers.order)), headers.order))
    ranked = ranked[headers.is_eligible[ranked]]
    for stratum in np.unique(strata[ranked]):
        members = ranked[strata[ranked] == stratum]
        bounds = _bounds(len(members), [ratio for _, ratio in parts])
        for (name, _), start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
            chosen[name].append(members[start:stop])
    return {
        name: np.sort(_cap(np.concatenate(found), headers, settings.max_per_source)) for name, found in chosen.items()
    }


def _strata(headers: _Headers, stratify: str) -> np.ndarray:
    if stratify == "source":
        return headers.source_of
    is_text = np.array([name == TEXT_SOURCE for name in headers.sources])[headers.source_of]
    return is_text.astype(np.int32) if stratify == "modality" else np.zeros_like(headers.source_of)


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
        for n, is_positive in enumerate(positive):
            bounds[n + 1] = max(bounds[n + 1], bounds[n] + is_positive)
        for n in reversed(range(len(ratios))):
            bounds[n + 1] = min(bounds[n + 1], size - sum(positive[n + 1 :]))
    return bounds


def _cap(chosen: np.ndarray, headers: _Headers, limit: int | None) -> np.ndarray:
    """Keep the first ``limit`` records of each source, in the order given."""
    if limit is None or not len(chosen):
        return chosen
    sources = headers.source_of[chosen]
    return np.concatenate([chosen[sources == source][:limit] for source in np.unique(sources)])


def _part_path(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}.{name}{output.suffix}") if name else output


def _warnings(before: dict[str, int], eligible: dict[str, int], parts: Sequence[SubsetPart]) -> list[str]:
    found = []
    for part in parts:
        if not part.num_records:
            found.append(f"{part.path} holds no record; training on it is impossible.")
            continue
        if not part.counts.get(TEXT_SOURCE):
            found.append(f"{part.path} holds no text-only record; the model may lose language ability.")
        empty = [name for name, count in eligible.items() if count and not part.counts[name]]
        if empty:
            found.append(f"{part.path} holds no record of {', '.join(empty)}: too few for this ratio or these parts.")
        if part.num_records < SMALLEST_USEFUL:
            found.append(
                f"{part.path} holds {part.num_records} records, less than one global batch of {SMALLEST_USEFUL}."
            )
    return found
