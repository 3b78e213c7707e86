"""Prompts of every kind, run by a loaded checkpoint and by transformers' own LLaVA, to be compared."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from layouts import NUM_PATCHES
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token

SQUARE = Image.linear_gradient("L").resize((40, 40))
WIDE = Image.radial_gradient("L").resize((90, 30))

PROMPTS: dict[str, tuple[str, list[Image.Image]]] = {
    "a square image": ("USER: <image>\nWhich digit is it? ASSISTANT:", [SQUARE]),
    "an image that is not square": ("USER: <image>\nWhat colour is the third row? ASSISTANT:", [WIDE]),
    "two images": ("USER: <image>\nand <image>\nRead every digit. ASSISTANT:", [WIDE, SQUARE]),
    "text only": ("USER: Add two and five, please. ASSISTANT:", []),
}


@torch.no_grad()
def our_logits(model: Any, tokenizer: Any, image_processor: Any, side: str) -> dict[str, Tensor]:
    """Logits of a loaded checkpoint, in one padded batch in LLaVA's convention: name -> (positions, vocabulary)."""
    rows = [tokenizer_image_token(text, tokenizer) for text, _ in PROMPTS.values()]
    input_ids, attention_mask = _pad(rows, side)
    images = process_images(
        [image for _, images in PROMPTS.values() for image in images], image_processor, model.config
    )
    output = model(input_ids=input_ids, attention_mask=attention_mask, images=images)
    lengths = [len(row) + row.count(IMAGE_TOKEN_INDEX) * (NUM_PATCHES - 1) for row in rows]
    return _split(output.logits, lengths, side)


@torch.no_grad()
def stock_logits(
    reference: LlavaForConditionalGeneration, tokenizer: Any, image_processor: Any, side: str
) -> dict[str, Tensor]:
    """Logits of transformers' own model, in one padded batch in its convention.

    Args:
        reference: The model.
        tokenizer: Gives ids of text.
        image_processor: Its vision tower's.
        side: Side of the padding, "left" or "right".
    """
    image_id, rows = reference.config.image_token_id, []
    for text, _ in PROMPTS.values():
        ids = [[number] for number in tokenizer_image_token(text, tokenizer)]
        rows.append([n for one in ids for n in ([image_id] * NUM_PATCHES if one[0] == IMAGE_TOKEN_INDEX else one)])
    input_ids, attention_mask = _pad(rows, side)
    images = [_pad_to_square(image, image_processor) for _, images in PROMPTS.values() for image in images]
    pixel_values = image_processor(images, return_tensors="pt").pixel_values
    output = reference(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
    return _split(output.logits, [len(row) for row in rows], side)


def largest_difference(ours: dict[str, Tensor], stock: dict[str, Tensor], vocab_size: int) -> dict[str, float]:
    """Largest difference of logits per prompt, over the ids that both vocabularies have."""
    return {name: float((ours[name][:, :vocab_size] - stock[name][:, :vocab_size]).abs().max()) for name in PROMPTS}


def _pad(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        input_ids[index, place], attention_mask[index, place] = torch.tensor(row), 1
    return input_ids, attention_mask


def _split(logits: Tensor, lengths: list[int], side: str) -> dict[str, Tensor]:
    rows = zip(PROMPTS, logits, lengths, strict=True)
    return {name: row[-length:] if side == "left" else row[:length] for name, row, length in rows}


def _pad_to_square(image: Image.Image, image_processor: Any) -> Image.Image:
    size = max(image.size)
    square = Image.new("RGB", (size, size), tuple(int(255 * value) for value in image_processor.image_mean))
    square.paste(image.convert("RGB"), ((size - image.width) // 2, (size - image.height) // 2))
    return square
