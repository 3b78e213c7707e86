"""Files that appear whole or not at all.

``llava.files`` has its own: this package loads torch, and a check of data is not to wait for that.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that a reader, or a launch that goes on after a kill, never meets half of it.

    Args:
        path: File to create or replace; its folder exists.

    Yields:
        An empty file beside ``path``. It becomes ``path`` when the block ends; when the block raises, it is removed
        and ``path`` stays as it was.
    """
    # beside the file, because a rename is whole only within one file system
    unfinished = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.touch(exist_ok=False)
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)  # safetensors replaces the file by one that its owner alone can read
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
