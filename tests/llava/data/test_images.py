"""Images are looked for inside their folder only, and whatever is wrong with one is told."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from image_files import make_images, save_image
from llava.data.images import (
    ImageFileError,
    ImageState,
    find_other_extension,
    inspect_image,
    looks_whole,
    open_rgb,
    resolve_image,
    sniff_format,
)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def test_image_inside_the_folder_is_found(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.jpg").write_bytes(b"x")
    assert resolve_image(tmp_path, "coco/1.jpg") == (tmp_path / "coco" / "1.jpg").resolve()


def test_links_that_the_user_made_are_followed_and_names_in_records_lead_nowhere_else(tmp_path):
    save_image(tmp_path / "datasets/coco/1.jpg", "JPEG")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "coco").symlink_to(tmp_path / "datasets" / "coco")
    (tmp_path / "real" / "one.jpg").symlink_to(tmp_path / "datasets" / "coco" / "1.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    for name in ("coco/1.jpg", "one.jpg"):
        assert resolve_image(tmp_path / "linked", name) == (tmp_path / "datasets/coco/1.jpg").resolve()
        assert inspect_image(tmp_path / "linked", name)[0] is ImageState.GOOD
    with pytest.raises(ImageFileError, match="climbs out"):
        resolve_image(tmp_path / "linked", "coco/../../datasets/coco/1.jpg")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.jpg", "climbs out"),
        ("/etc/passwd", "absolute path"),
        ("coco/absent.jpg", "is not in"),
        ("coco", "is a folder in"),
        ("", "empty name"),
    ],
)
def test_other_image_names_are_refused(tmp_path, name, message):
    (tmp_path / "data" / "coco").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    with pytest.raises(ImageFileError, match=message):
        resolve_image(tmp_path / "data", name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_whole_images_are_not_decoded_and_those_with_more_behind_their_end_are_good(tmp_path, kind):
    save_image(tmp_path / "image", kind)
    assert looks_whole(tmp_path / "image")
    with open(tmp_path / "image", "ab") as handle:
        handle.write(b"\0\0 written by a camera")
    assert looks_whole(tmp_path / "image") == (kind == "WEBP"), "only WEBP says in front how long it is"
    assert inspect_image(tmp_path, "image")[0] is ImageState.GOOD


def test_images_outside_the_folder_are_missing(tmp_path, images):
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (images / "out.jpg").symlink_to(tmp_path / "absent.jpg")
    assert inspect_image(images, "out.jpg")[0] is ImageState.MISSING
    assert inspect_image(images, "../secret.jpg")[0] is ImageState.MISSING
    assert inspect_image(images, "x" * 5000)[0] is ImageState.MISSING


def test_first_frame_of_a_gif_named_jpg_is_decoded_as_rgb(images):
    image = open_rgb(images / "ocr_vqa/mislabelled.jpg")
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 0, 0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vg/empty.jpg", "zero bytes"),
        ("vg/page.jpg", "not a known image format"),
        ("vg/cut.jpg", "does not decode .JPEG"),
    ],
)
def test_undecodable_image_says_why(images, name, message):
    with pytest.raises(ImageFileError, match=message):
        open_rgb(images / name)


def test_unreadable_image_says_why(images):
    with pytest.raises(ImageFileError, match="cannot be read"):
        open_rgb(images / "absent.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_format_is_known_from_the_first_bytes(tmp_path, kind):
    save_image(tmp_path / "image.bin", kind)
    assert sniff_format(tmp_path / "image.bin") == kind


def test_other_extension_must_be_an_image(images):
    (images / "vg/fake.png").write_bytes(b"not an image")
    assert find_other_extension(images, "vg/fake.jpg") is None
    os.replace(images / "coco/good.jpg", images / "vg/fake.webp")
    assert find_other_extension(images, "vg/fake.jpg") == "vg/fake.webp"


def _ramp(kind: type) -> np.ndarray:
    return np.linspace(0, 65535, 256).astype(kind).reshape(1, 256).repeat(8, 0)


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
def test_greyscale_of_sixteen_bits_keeps_its_shades(tmp_path: Path, name: str) -> None:
    Image.fromarray(_ramp(np.uint16)).save(tmp_path / name)
    shades = np.asarray(open_rgb(tmp_path / name))
    assert shades.shape == (8, 256, 3) and len(np.unique(shades)) > 250 and abs(shades.mean() - 127) < 1


def test_an_image_of_floating_point_numbers_is_refused(tmp_path: Path) -> None:
    Image.fromarray(_ramp(np.float32) / 65535).save(tmp_path / "ramp.tif")
    with pytest.raises(ImageFileError, match="holds floating-point numbers; 8 or 16 bits per pixel are allowed"):
        open_rgb(tmp_path / "ramp.tif")
    assert inspect_image(tmp_path, "ramp.tif")[0] is ImageState.CORRUPT


@pytest.mark.parametrize(
    ("size", "is_good"), [((1, 1), True), ((200, 1), True), ((1, 201), False), ((20_000, 1), False)]
)
def test_an_image_too_thin_to_be_padded_is_refused_by_its_header(tmp_path: Path, size: tuple, is_good: bool) -> None:
    Image.new("RGB", size).save(tmp_path / "thin.png")
    state, reason = inspect_image(tmp_path, "thin.png")
    assert (state is ImageState.GOOD) is is_good
    assert is_good or f"has {size[0]} x {size[1]} pixels; a side may be 200 times the other" in reason


def test_what_the_decoder_will_refuse_is_told_by_the_header_alone(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text("prompt", "x" * (2 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "text.png", pnginfo=metadata)
    for name, remedy in (("huge.png", "Make it smaller"), ("text.png", "save it without")):
        assert looks_whole(tmp_path / name)
        state, reason = inspect_image(tmp_path, name)
        assert state is ImageState.CORRUPT and remedy in reason and "ownload it again" not in reason
