"""The real scanned digits, split so that no scan is ever seen in two splits.

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
CELL_SIZE = 16
_SCAN_SIZE = 8
_SCAN_MAXIMUM = 16
_MARGIN = 2  # Empty pixels around a scan, so that the interpolation fades out instead of ending in a hard edge.
_TRAIN_PER_DIGIT = 120
_TEST_PER_DIGIT = 40  # What is left of each digit, 14 to 23 scans, is for validation.


@dataclass(frozen=True)
class Jitter:
    """A small change of how a scan lies in its cell; the default changes nothing.

    Attributes:
        shift_x: Shift to the right, in cell pixels.
        shift_y: Shift downwards, in cell pixels.
        degrees: Clockwise rotation about the middle of the scan, in degrees.
        scale: Size relative to the cell, positive.
    """

    shift_x: float = 0.0
    shift_y: float = 0.0
    degrees: float = 0.0
    scale: float = 1.0

    @classmethod
    def draw(cls, random: Random) -> Jitter:
        """Draw a shift up to 1 px, a rotation up to 8 degrees and a scale in [0.9, 1.1]."""
        return cls(
            shift_x=random.uniform(-1.0, 1.0),
            shift_y=random.uniform(-1.0, 1.0),
            degrees=random.uniform(-8.0, 8.0),
            scale=random.uniform(0.9, 1.1),
        )


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Load all scans and the digits they show.

    Returns:
        Scans, (1797, 8, 8), uint8 in [0, 255], and digits, (1797,), int64 in [0, 9].
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    scans = np.rint(bunch.images * (255 / _SCAN_MAXIMUM)).astype(np.uint8)
    return scans, bunch.target.astype(np.int64)


def split_scans(seed: int) -> dict[str, dict[int, list[int]]]:
    """Deal the scans of every digit into train (120 per digit), test (40) and validation (the rest).

    Args:
        seed: Seed of the dealing.

    Returns:
        For every split and every digit the indices of its scans, sorted.
    """
    _, digits = load_scans()
    random = Random(f"{seed}/scans")
    split: dict[str, dict[int, list[int]]] = {name: {} for name in SPLITS}
    for digit in range(10):
        indices = np.flatnonzero(digits == digit).tolist()
        random.shuffle(indices)
        train_end = _TRAIN_PER_DIGIT
        test_end = train_end + _TEST_PER_DIGIT
        split["train"][digit] = sorted(indices[:train_end])
        split["test"][digit] = sorted(indices[train_end:test_end])
        split["validation"][digit] = sorted(indices[test_end:])
    return split


def hash_split(split: dict[str, dict[int, list[int]]]) -> str:
    """Give the SHA-256 of a split, so that two datasets can be seen to hold out the same scans."""
    return hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()


@cache
def _padded_scan(index: int) -> Image.Image:
    return Image.fromarray(np.pad(load_scans()[0][index], _MARGIN))


def draw_scan(index: int, jitter: Jitter) -> Image.Image:
    """Draw one scan at the size of a cell, with bicubic interpolation.

    Args:
        index: Which scan, in [0, 1796].
        jitter: How it lies in the cell.

    Returns:
        A grey image of 16 x 16 pixels.
    """
    # PIL asks for the way back: source = A (target - shifted middle of the cell) + middle of the scan.
    shrink = _SCAN_SIZE / (CELL_SIZE * jitter.scale)
    cosine = math.cos(math.radians(jitter.degrees)) * shrink
    sine = math.sin(math.radians(jitter.degrees)) * shrink
    target_x = CELL_SIZE / 2 + jitter.shift_x
    target_y = CELL_SIZE / 2 + jitter.shift_y
    source_middle = _SCAN_SIZE / 2 + _MARGIN
    coefficients = (
        cosine,
        sine,
        source_middle - cosine * target_x - sine * target_y,
        -sine,
        cosine,
        source_middle + sine * target_x - cosine * target_y,
    )
    size = (CELL_SIZE, CELL_SIZE)
    return _padded_scan(index).transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
