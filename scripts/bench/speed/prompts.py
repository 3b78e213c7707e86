"""Questions of the digits test set as inputs of a trained checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

from torch import Tensor

from llava.data.images import open_rgb, resolve_image
from llava.data.records import RecordFile
from llava.inference.generator import Generator, make_message


def load_prompts(generator: Generator, data: Path, number: int, with_image: bool = False) -> list[dict[str, Tensor]]:
    """Inputs of batch 1, drawn with a fixed seed.

    Args:
        generator: The checkpoint.
        data: Folder of the dataset, with ``digits_test.json`` and ``images``.
        number: Prompts to draw.
        with_image: Draw from questions about images only.
    """
    records = [record for record in RecordFile(data / "digits_test.json") if record.images or not with_image]
    prompts = []
    for record in random.Random(0).sample(records, number):
        images = [open_rgb(resolve_image(data / "images", name)) for name in record.images]
        prompts.append(generator.encode([make_message(record.turns[0].question, images)]))
    return prompts
