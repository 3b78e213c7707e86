"""Real scanned digits, split so that no scan is ever seen in two splits, and canvases of one to four of them.

The scans are the 1,797 of the UCI "Optical Recognition of Handwritten Digits" data that ship with scikit-learn. The
split is by scan, not by writer: the data do not say who wrote what.

Reference:
    E. Alpaydin, C. Kaynak (1998), doi 10.24432/C50P49, CC BY 4.0.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test")
CELL_NAMES = ("top left", "top right", "bottom left", "bottom right")
FOLDERS = ("single", "pair", "triple", "quad")
CELL_SIZE = 16
_SCAN_SIZE = 8
_MARGIN = 2  # Empty pixels around a scan, so that the interpolation fades out instead of ending in a hard edge.
_TRAIN_PER_DIGIT = 120
_TEST_PER_DIGIT = 40  # What is left of each digit, 14 to 23 scans, is for validation.


@dataclass(frozen=True)
class Jitter:
    """A small change of how a scan lies in its cell; the default changes nothing."""

    shift_x: float = 0.0  # to the right, in cell pixels
    shift_y: float = 0.0  # downwards
    degrees: float = 0.0  # clockwise rotation about the middle of the scan
    scale: float = 1.0  # relative to the cell, positive

    @classmethod
    def draw(cls, random: Random) -> Jitter:
        """Draw a shift up to 1 px, a rotation up to 8 degrees and a scale in [0.9, 1.1]."""
        return cls(*(random.uniform(*limits) for limits in ((-1.0, 1.0), (-1.0, 1.0), (-8.0, 8.0), (0.9, 1.1))))


@dataclass(frozen=True)
class Canvas:
    """What the four cells hold, in the order of ``CELL_NAMES``; None where a cell is empty."""

    digits: tuple[int | None, ...]  # in [0, 9]
    scans: tuple[int | None, ...]  # indices of scans

    @property
    def folder(self) -> str:
        """The folder of its image: one source folder per number of scans."""
        return FOLDERS[sum(digit is not None for digit in self.digits) - 1]


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Load all scans, (1797, 8, 8), uint8 in [0, 255], and the digits they show, (1797,), int64 in [0, 9]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()  # intensities up to 16
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)


def split_scans(seed: int) -> dict[str, dict[int, list[int]]]:
    """Deal the scans of every digit into train (120 per digit), test (40) and validation (the rest).

    Returns:
        For every split and every digit the indices of its scans, sorted.
    """
    random, split = Random(f"{seed}/scans"), {name: {} for name in SPLITS}
    for digit in range(10):
        indices = np.flatnonzero(load_scans()[1] == digit).tolist()
        random.shuffle(indices)
        train, rest = indices[:_TRAIN_PER_DIGIT], indices[_TRAIN_PER_DIGIT:]
        for name, part in (("train", train), ("test", rest[:_TEST_PER_DIGIT]), ("validation", rest[_TEST_PER_DIGIT:])):
            split[name][digit] = sorted(part)
    return split


def hash_split(split: dict[str, dict[int, list[int]]]) -> str:
    """Give the SHA-256 of a split, so that two datasets can be seen to hold out the same scans."""
    return hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()


@cache
def _padded_scan(index: int) -> Image.Image:
    return Image.fromarray(np.pad(load_scans()[0][index], _MARGIN))


def draw_scan(index: int, jitter: Jitter) -> Image.Image:
    """Draw a scan, in [0, 1796], at the size of a cell with bicubic interpolation: a grey image of 16 x 16 pixels."""
    # PIL asks for the way back: source = A (target - shifted middle of the cell) + middle of the scan.
    shrink = _SCAN_SIZE / (CELL_SIZE * jitter.scale)
    cosine = math.cos(math.radians(jitter.degrees)) * shrink
    sine = math.sin(math.radians(jitter.degrees)) * shrink
    target_x, target_y = CELL_SIZE / 2 + jitter.shift_x, CELL_SIZE / 2 + jitter.shift_y
    middle = _SCAN_SIZE / 2 + _MARGIN
    to_x = (cosine, sine, middle - cosine * target_x - sine * target_y)
    to_y = (-sine, cosine, middle + sine * target_x - cosine * target_y)
    size = (CELL_SIZE, CELL_SIZE)
    return _padded_scan(index).transform(size, Image.Transform.AFFINE, to_x + to_y, Image.Resampling.BICUBIC)


def draw_canvas(scans_by_digit: dict[int, list[int]], random: Random) -> Canvas:
    """Draw a canvas of the scans of one split: its number of scans, its cells and its digits are all uniform."""
    digits: list[int | None] = [None] * 4
    scans: list[int | None] = [None] * 4
    for cell in random.sample(range(4), random.randint(1, 4)):
        digits[cell] = random.randrange(10)
        scans[cell] = random.choice(scans_by_digit[digits[cell]])
    return Canvas(tuple(digits), tuple(scans))


def render_canvas(canvas: Canvas, random: Random | None = None) -> Image.Image:
    """Render a canvas, white on black, as an RGB image of 32 x 32 pixels; without ``random`` no scan is jittered."""
    image = Image.new("L", (2 * CELL_SIZE, 2 * CELL_SIZE))
    for cell, scan in enumerate(canvas.scans):
        if scan is not None:
            row, column = divmod(cell, 2)
            jitter = Jitter() if random is None else Jitter.draw(random)
            image.paste(draw_scan(scan, jitter), (column * CELL_SIZE, row * CELL_SIZE))
    return image.convert("RGB")
