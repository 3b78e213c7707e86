"""Image files of every condition that a folder of training data can hold."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def save_image(path: Path, kind: str, color: tuple[int, int, int] = (255, 0, 0)) -> None:
    """Write a picture of 4 x 4 pixels, with a second frame if it is a GIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (4, 4), color)
    more = {"save_all": True, "append_images": [Image.new("RGB", (4, 4), (0, 0, 255))]} if kind == "GIF" else {}
    image.save(path, format=kind, **more)


def make_images(folder: Path) -> Path:
    """Fill a folder with good, mislabelled, empty, cut and foreign files."""
    save_image(folder / "coco/good.jpg", "JPEG")
    save_image(folder / "ocr_vqa/gif.gif", "GIF")
    save_image(folder / "ocr_vqa/png.PNG", "PNG")
    save_image(folder / "ocr_vqa/mislabelled.jpg", "GIF")
    (folder / "vg").mkdir()
    (folder / "vg/empty.jpg").write_bytes(b"")
    (folder / "vg/page.jpg").write_bytes(b"<html>gone</html>")
    (folder / "vg/cut.jpg").write_bytes((folder / "coco/good.jpg").read_bytes()[:300])
    return folder
