"""A canvas: one to four scans in a grid of two by two cells."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image

from playground.digits.scans import CELL_SIZE, Jitter, draw_scan

CELL_NAMES = ("top left", "top right", "bottom left", "bottom right")
FOLDERS = ("single", "pair", "triple", "quad")
CANVAS_SIZE = 2 * CELL_SIZE


@dataclass(frozen=True)
class Canvas:
    """What the four cells hold, in the order of ``CELL_NAMES``.

    Attributes:
        digits: The digit in each cell, in [0, 9]; None where the cell is empty.
        scans: The index of the scan in each cell; None where the cell is empty.
    """

    digits: tuple[int | None, ...]
    scans: tuple[int | None, ...]

    @property
    def folder(self) -> str:
        """The folder of its image: one source folder per number of scans."""
        return FOLDERS[sum(digit is not None for digit in self.digits) - 1]


def draw_canvas(scans_by_digit: dict[int, list[int]], random: Random) -> Canvas:
    """Draw a canvas: its number of scans, its cells and its digits are all uniform.

    Args:
        scans_by_digit: The scans of one split, by digit.
        random: Source of randomness.
    """
    filled = random.sample(range(4), random.randint(1, 4))
    digits: list[int | None] = [None] * 4
    scans: list[int | None] = [None] * 4
    for cell in filled:
        digit = random.randrange(10)
        digits[cell] = digit
        scans[cell] = random.choice(scans_by_digit[digit])
    return Canvas(tuple(digits), tuple(scans))


def render_canvas(canvas: Canvas, random: Random | None = None) -> Image.Image:
    """Render a canvas, white strokes on black.

    Args:
        canvas: What to render.
        random: Source of the jitter of each scan; None for no jitter.

    Returns:
        An RGB image of 32 x 32 pixels.
    """
    image = Image.new("L", (CANVAS_SIZE, CANVAS_SIZE))
    for cell, scan in enumerate(canvas.scans):
        if scan is not None:
            jitter = Jitter() if random is None else Jitter.draw(random)
            row, column = divmod(cell, 2)
            image.paste(draw_scan(scan, jitter), (column * CELL_SIZE, row * CELL_SIZE))
    return image.convert("RGB")
