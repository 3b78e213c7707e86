"""Image files as downloads leave them: wrong endings, empty, cut off, GIFs named .jpg."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from PIL import Image

from llava.data.records import ImageFileError, resolve_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp")
_MAGIC = ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"))
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
_LONGEST_END = max(map(len, _ENDS.values()))


class ImageState(Enum):
    """What is wrong with an image file."""

    GOOD = "good"
    MISSING = "missing"  # not in the folder, or named by a path that leaves it
    EMPTY = "empty"  # zero bytes
    CORRUPT = "corrupt"  # does not decode


def sniff_format(path: str | Path) -> str | None:
    """Give the image format that a file's first bytes announce.

    Returns:
        "JPEG", "PNG", "GIF", "WEBP", or None for anything else.
    """
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
            handle.seek(max(0, size - _LONGEST_END))
            return kind is not None and handle.read().endswith(_ENDS[kind])
    except OSError:
        return False


def open_rgb(path: str | Path) -> Image.Image:
    """Decode an image file as RGB, whatever its ending says; of an animation the first frame.

    Raises:
        ImageFileError: If the file is empty or does not decode.
    """
    try:
        size, kind = os.path.getsize(path), sniff_format(path) or "not a known image format"
    except OSError as error:
        raise ImageFileError(f"Image '{path}' cannot be read ({error.strerror}); it must be. Check rights.") from error
    if size == 0:
        raise ImageFileError(f"Image '{path}' has zero bytes; an image is needed. Download it or drop the record.")
    try:
        with Image.open(path) as image:
            image.seek(0)
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files, SyntaxError among them
        raise ImageFileError(
            f"Image '{path}' does not decode ({kind}: {error}); a whole image is needed. "
            "Download it again or drop the record."
        ) from error


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
    if decode or not looks_whole(path):
        try:
            open_rgb(path)
        except ImageFileError as error:
            return ImageState.CORRUPT, str(error)
    return ImageState.GOOD, ""


def find_other_extension(image_folder: str | Path, relative: str) -> str | None:
    """Find an image that was saved with another ending than its record says.

    OCR-VQA is named ``.jpg`` throughout in LLaVA's mixture, while downloads keep ``.gif`` and ``.png``.

    Returns:
        The name with the first of ``EXTENSIONS`` (either case) whose file starts like an image; None if there is none.
    """
    stem = relative.rsplit(".", 1)[0] if "." in relative.rsplit("/", 1)[-1] else relative
    for extension in EXTENSIONS:
        for name in (stem + extension, stem + extension.upper()):
            if name != relative and inspect_image(image_folder, name)[0] is ImageState.GOOD:
                if sniff_format(resolve_image(image_folder, name)):
                    return name
    return None
