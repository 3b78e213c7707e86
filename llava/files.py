"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file that appears whole or not at all.

    Args:
        path: File to create or replace; its folder exists.

    Yields:
        An empty file beside ``path`` to write to, with the same extension. It becomes ``path`` when the block ends;
        when the block raises, it is removed and ``path`` stays as it was.

    Raises:
        OSError: If the folder cannot be written, or the disk is full.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder, "numbers.json")) as unfinished:
    ...         _ = unfinished.write_text("[1, 2]")
    ...     [file.name for file in Path(folder).iterdir()]
    ['numbers.json']
    """
    with atomic_write_all([path]) as (unfinished,):
        yield unfinished


@contextmanager
def atomic_write_all(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Write several files of which all appear or none; see ``atomic_write``."""
    finals = [Path(path) for path in paths]
    # A name of its own for each, so that two writers, or a file of the user's, are never in each other's way.
    unfinished = [path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}") for path in finals]
    try:
        modes = [_create(path) for path in unfinished]
        yield unfinished
        for path, mode in zip(unfinished, modes, strict=True):
            os.chmod(path, mode)  # safetensors replaces the file by one that its owner alone can read
            flush_to_disk(path)  # a full disk speaks up here at the latest, before any file appears
        for path, final in zip(unfinished, finals, strict=True):
            os.replace(path, final)
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON with a newline at the end; see ``atomic_write``."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _create(path: Path) -> int:
    """Create an empty file and give its permissions, which follow the user's umask."""
    path.touch(exist_ok=False)
    return stat.S_IMODE(path.stat().st_mode)


def flush_to_disk(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
