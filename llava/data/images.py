"""Images that records name, as downloads leave them: wrong extensions, empty, cut off, GIFs named .jpg."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import numpy as np
from PIL import Image

from llava.data.records import DataError, check_image_name

MAX_ASPECT = 200
"""Largest ratio of the sides of an image."""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp")
_MAGIC = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"))
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}


class ImageFileError(DataError):
    """Says why an image named by a record cannot be opened from the image folder."""


class ImageState(Enum):
    """What is wrong with an image file."""

    GOOD = "good"
    MISSING = "missing"  # not in the folder, or named by a path that leaves it
    EMPTY = "empty"  # zero bytes
    CORRUPT = "corrupt"  # cannot be decoded


def resolve_image(image_folder: str | Path, relative: str) -> Path:
    """Find an image inside the image folder, where links that its owner made may lead elsewhere.

    Args:
        image_folder: Folder that all image names are relative to.
        relative: Name as written in a record, with forward slashes.

    Returns:
        Path of an existing file, links resolved.

    Raises:
        ImageFileError: If the name is absolute, climbs out of the folder, or names no file.
    """
    try:
        # A file of records comes from elsewhere: it must not be able to name any file of this machine.
        check_image_name(relative)
    except DataError as problem:
        raise ImageFileError(str(problem)) from None
    path = Path(os.path.realpath(Path(image_folder, relative)))
    if not path.is_file():
        what = "is a folder in" if path.is_dir() else "is not in"
        remedy = "Download it, or drop the record."
        raise ImageFileError(f"Image '{relative}' {what} '{image_folder}'; a record must name a file there. {remedy}")
    return path


def open_rgb(path: str | Path) -> Image.Image:
    """Decode an image file as RGB, whatever its extension says; of an animation the first frame.

    Greyscale of 16 bits keeps its upper 8, as image viewers show it.

    Raises:
        ImageFileError: If the file is empty, does not decode, or holds numbers that are no colours.
    """
    with _opened(path) as image:
        image.seek(0)
        if not image.mode.startswith("I"):
            return image.convert("RGB")
        # Pillow would clip every value above 255, and leave a white square.
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")


def inspect_image(image_folder: str | Path, relative: str, decode: bool = False) -> tuple[ImageState, str]:
    """Find out whether an image can be used.

    Args:
        image_folder: Folder that image names are relative to.
        relative: Name as written in a record.
        decode: Whether to decode it in any case; otherwise only where its beginning and end leave a doubt, which
            finds pages saved as images and downloads that stopped early, not damage in the middle.

    Returns:
        The state, and the reason where it is not good.
    """
    try:
        path = resolve_image(image_folder, relative)
    except ImageFileError as error:
        return ImageState.MISSING, str(error)
    except (OSError, ValueError) as error:  # names too long for the file system, loops of links
        return ImageState.MISSING, f"Image {relative[:80]!r} cannot be looked up ({error}); use a shorter, plain name."
    if path.stat().st_size == 0:
        return ImageState.EMPTY, f"Image '{relative}' has zero bytes; download it again or drop the record."
    try:
        if decode or not looks_whole(path):
            open_rgb(path)
        else:
            with _opened(path):  # its header alone tells what the decoder refuses: too many pixels, for example
                pass
    except ImageFileError as error:
        return ImageState.CORRUPT, str(error)
    return ImageState.GOOD, ""


def find_other_extension(image_folder: str | Path, relative: str) -> str | None:
    """Find an image that was saved with another extension than its record says.

    OCR-VQA is named ``.jpg`` throughout in LLaVA's mixture, while downloads keep ``.gif`` and ``.png``.

    Returns:
        The name with the first of ``EXTENSIONS`` (either case) whose file is an image; None if there is none.
    """
    stem = relative.rsplit(".", 1)[0] if "." in relative.rsplit("/", 1)[-1] else relative
    for extension in EXTENSIONS:
        for name in (stem + extension, stem + extension.upper()):
            if name != relative and inspect_image(image_folder, name)[0] is ImageState.GOOD:
                return name
    return None


def sniff_format(path: str | Path) -> str | None:
    """Give the format that a file's first bytes announce: "JPEG", "PNG", "GIF", "WEBP", or None for anything else."""
    with open(path, "rb") as handle:
        head = handle.read(12)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if head.startswith(magic)), None)


def looks_whole(path: str | Path) -> bool:
    """Whether a file starts as an image and ends as that kind of image does; two short reads, nothing is decoded.

    False says nothing: a whole image may carry more behind its end, or may not be readable now.
    """
    try:
        kind, size = sniff_format(path), os.path.getsize(path)
        with open(path, "rb") as handle:
            if kind == "WEBP":  # its header says how long it is
                handle.seek(4)
                return int.from_bytes(handle.read(4), "little") + 8 <= size
            handle.seek(max(0, size - max(map(len, _ENDS.values()))))
            return kind is not None and handle.read().endswith(_ENDS[kind])
    except OSError:
        return False


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The one place where images are opened: whatever goes wrong is an ImageFileError that says what to do."""
    kind, drop = None, "Download it again or drop the record."
    try:
        kind = sniff_format(path) or "not a known image format"
        if os.path.getsize(path) == 0:
            raise ImageFileError(f"Image '{path}' has zero bytes; an image is needed. {drop}")
        with Image.open(path) as image:
            if image.mode == "F":
                allowed = "8 or 16 bits per pixel are allowed. Save it as such."
                raise ImageFileError(f"Image '{path}' holds floating-point numbers; {allowed}")
            if max(image.size) > MAX_ASPECT * min(image.size):  # padded to a square, 80 bytes would take gigabytes
                allowed = f"a side may be {MAX_ASPECT} times the other. Crop it or drop the record."
                raise ImageFileError(f"Image '{path}' has {image.width} x {image.height} pixels; {allowed}")
            yield image
    except ImageFileError:
        raise
    except Image.DecompressionBombError as error:
        allowed = "fewer pixels are allowed. Make it smaller or drop the record."
        raise ImageFileError(f"Image '{path}' is too large ({error}); {allowed}") from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files, SyntaxError among them
        if kind is None:
            reason = getattr(error, "strerror", error)  # without the path again
            raise ImageFileError(f"Image '{path}' cannot be read ({reason}); it must be. Check its rights.") from error
        if "Decompressed data too large" in str(error):
            drop = "It carries a text or profile beyond the decoder's limit: save it without, or drop the record."
        raise ImageFileError(
            f"Image '{path}' does not decode ({kind}: {error}); a whole one is needed. {drop}"
        ) from error
