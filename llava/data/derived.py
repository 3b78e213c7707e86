"""A record file made from another one: written whole or not at all, with a manifest that says how."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.json_index import DataError
from llava.data.records import RecordFile

_MANIFEST_SUFFIX = ".manifest.json"
_VOLATILE = ("input", "command", "version", "output", "output_sha256")  # may differ between two equal results


@dataclass(frozen=True, eq=False)
class DerivedFile:
    """One file to make.

    Attributes:
        path: Where; ``.jsonl`` gives JSON Lines, ``.json`` an array, anything else the form of the input.
        indices: Records to take, ascending, int64.
        manifest: How the file comes about; two files with equal manifests are taken to be the same.
    """

    path: Path
    indices: np.ndarray
    manifest: dict[str, Any]

    @property
    def manifest_path(self) -> Path:
        """``OUTPUT.manifest.json``."""
        return Path(f"{self.path}{_MANIFEST_SUFFIX}")


def describe(source: RecordFile, input_sha256: str, keys: Sequence[str], settings: dict, command: str) -> dict:
    """Build the manifest of a derived file.

    Args:
        source: The input.
        input_sha256: Its SHA-256.
        keys: One string per taken record that names it even where ids repeat.
        settings: What decided which records are taken.
        command: Command line that does it again.
    """
    return {
        "version": _version(),
        "command": command,
        "input": str(source.path),
        "input_sha256": input_sha256,
        "input_records": len(source),
        "settings": settings,
        "records": len(keys),
        "kept_keys_sha256": hashlib.sha256("\n".join(sorted(keys)).encode("utf-8", "surrogatepass")).hexdigest(),
    }


def check_target(path: Path, source: Path) -> None:
    """Refuse a target that can never be written, before any work is done.

    Raises:
        DataError: If ``path`` or its manifest is the input ``source``, is a folder, or lies in no folder.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; the name of a file is needed. Add a file name to the output.")
    if not path.parent.is_dir():
        raise DataError(f"The output folder {path.parent} does not exist; it must. Create it: mkdir -p {path.parent}")
    for target in (path, Path(f"{path}{_MANIFEST_SUFFIX}")):
        if target.exists() and os.path.samefile(target, source):
            raise DataError(f"{target} is the input itself; another file is needed. Choose another output name.")


def write_derived(
    files: Sequence[DerivedFile],
    source: RecordFile,
    overwrite: bool = False,
    rewrite: Callable[[int, bytes], bytes] | None = None,
) -> list[bool]:
    """Write record files and their manifests; either all of them appear or none.

    Records are copied byte for byte, one at a time.

    Args:
        files: What to write.
        source: Where the records come from; never touched.
        overwrite: Whether other content at a target may be replaced.
        rewrite: Gives the new text of a record from its index and its text.

    Returns:
        For each file, whether it was written; False where the very same result was there already.

    Raises:
        DataError: If a target is the input, exists with other content, or cannot be written; nothing is left behind.
    """
    for file in files:
        check_target(file.path, source.path)
    todo = [file for file in files if not _is_there(file)]
    for file in todo:
        taken = next((path for path in (file.path, file.manifest_path) if path.exists()), None)
        if taken and not overwrite:
            raise DataError(
                f"{taken} exists and is not the result of this command; a new name is needed. "
                "Choose another output, remove it, or add --overwrite."
            )
    temporary: list[Path] = []
    try:
        for file in todo:
            data, manifest = _temporary(file.path), _temporary(file.manifest_path)
            temporary += [data, manifest]
            digest = _write_records(data, file, source, rewrite)
            manifest_text = json.dumps({**file.manifest, "output": file.path.name, "output_sha256": digest}, indent=2)
            _write_synced(manifest, manifest_text.encode() + b"\n")
        for file in todo:
            os.replace(_temporary(file.path), file.path)
            os.replace(_temporary(file.manifest_path), file.manifest_path)
    except OSError as error:
        raise DataError(
            f"Writing {files[0].path} failed ({error.strerror}); nothing was written. "
            "Make room or choose another folder, then run again."
        ) from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return [file in todo for file in files]


def sha256_of(path: str | Path) -> str:
    """Give the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _version() -> str:
    try:
        return version("fuzzyroe")
    except PackageNotFoundError:
        return "source tree"


def _is_there(file: DerivedFile) -> bool:
    """Whether the very same result is at the target already."""
    try:
        old = json.loads(file.manifest_path.read_text(encoding="utf-8"))
        return _stable(old) == _stable(file.manifest) and old.get("output_sha256") == sha256_of(file.path)
    except (OSError, ValueError, AttributeError):
        return False


def _stable(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key not in _VOLATILE}


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _write_records(
    path: Path, file: DerivedFile, source: RecordFile, rewrite: Callable[[int, bytes], bytes] | None
) -> str:
    """Write the records of one file and give its SHA-256."""
    is_lines = {".jsonl": True, ".json": False}.get(file.path.suffix.lower(), source.is_lines)
    opening, separator, closing = (b"", b"\n", b"\n") if is_lines else (b"[\n", b",\n", b"\n]\n")
    digest = hashlib.sha256()
    with open(path, "wb") as handle:

        def put(data: bytes) -> None:
            digest.update(data)
            handle.write(data)

        put(opening)
        for number, index in enumerate(file.indices.tolist()):
            text = source.raw_bytes(index)
            text = rewrite(index, text) if rewrite else text
            if is_lines and (b"\n" in text or b"\r" in text):
                text = to_json(source.raw(index))
            put(separator + text if number else text)
        put(closing if len(file.indices) or not is_lines else b"")
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


def to_json(obj: dict[str, Any]) -> bytes:
    """Give one object as one line of JSON; half surrogate pairs stay escaped."""
    text = json.dumps(obj, ensure_ascii=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(obj).encode("ascii")
