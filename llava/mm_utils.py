"""Helpers around images and prompts, a public contract with lmms-eval and with LLaVA's users."""

from __future__ import annotations

import ast
import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

ASPECTS = ("pad", "square", "original", "anyres")
"""Values of ``image_aspect_ratio``: how an image is fitted to the vision tower."""


def load_image_from_base64(image: str | bytes) -> Any:
    """Decode a base64 string, as LLaVA's web server gets images, to a PIL image."""
    return Image.open(io.BytesIO(base64.b64decode(image)))


def expand2square(image: Any, background_color: tuple[int, ...]) -> Any:
    """Centre a PIL image on a square canvas of its longer side, filled with ``background_color``.

    >>> expand2square(Image.new("RGB", (40, 30)), (0, 0, 0)).size
    (40, 40)
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new(image.mode, (side, side), background_color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def process_images(images: list, image_processor: Any, model_cfg: Any) -> Any:
    """Turn PIL images into pixel values.

    Args:
        images: PIL images of any size.
        image_processor: A CLIP image processor.
        model_cfg: Configuration with ``image_aspect_ratio``, one of ``ASPECTS`` or absent: "pad" centres each image on
            a square of the processor's mean colour; "anyres" gives an overview and tiles of each image, for one of its
            ``image_grid_pinpoints``; "square" and "original" (as lmms-eval's tasks say it), as where it is absent,
            leave resizing and cropping to the processor.

    Returns:
        Pixel values, float32: (images, 3, H, W); for "anyres" (images, tiles, 3, H, W), or a list of (tiles, 3, H, W)
        where the numbers of tiles differ.

    Raises:
        ValueError: If ``image_aspect_ratio`` is unknown, or "anyres" has no resolutions to choose from.
    """
    aspect = getattr(model_cfg, "image_aspect_ratio", None) or "square"
    resolutions = getattr(model_cfg, "image_grid_pinpoints", None)
    if aspect not in ASPECTS:
        raise ValueError(f"image_aspect_ratio is {aspect!r}; use {', '.join(ASPECTS)}. Correct config.json.")
    images = [image.convert("RGB") for image in images]
    if aspect == "pad":
        background = tuple(int(channel * 255) for channel in image_processor.image_mean)
        images = [expand2square(image, background) for image in images]
    if aspect != "anyres":
        return image_processor(images, return_tensors="pt")["pixel_values"]
    if not resolutions:
        raise ValueError(
            "image_aspect_ratio is 'anyres', but the configuration has no image_grid_pinpoints; give the resolutions, "
            "[[336, 672], [672, 336]] for example, or use 'pad' as LLaVA-1.5 does."
        )
    tiled = [process_anyres_image(image, image_processor, resolutions) for image in images]
    return torch.stack(tiled) if len({tiles.shape for tiles in tiled}) == 1 else tiled


def select_best_resolution(original_size: tuple[int, int], possible_resolutions: Sequence) -> tuple[int, int]:
    """The resolution that keeps most of an image's pixels; of equals, the one that wastes least.

    Args:
        original_size: (width, height) of the image.
        possible_resolutions: (width, height) of each.

    Reference:
        LLaVA-1.6, "dynamic high resolution".

    >>> select_best_resolution((800, 400), [(336, 672), (672, 336), (672, 672)])
    (672, 336)
    """
    width, height = original_size

    def rank(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        # enlarging an image adds no pixels
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    width_and_height = max(possible_resolutions, key=rank)
    return width_and_height[0], width_and_height[1]


def process_anyres_image(image: Any, processor: Any, grid_pinpoints: str | Sequence) -> Any:
    """Give an image as an overview and tiles of the vision tower's size.

    The image is fitted, black around it, into the best of the resolutions, which is cut into tiles row by row. The
    overview in front of them is the whole image, squeezed into a square.

    Args:
        image: PIL image, RGB.
        processor: CLIP image processor.
        grid_pinpoints: Possible (width, height), multiples of the tower's, as a list or its text.

    Returns:
        Pixel values, (1 + tiles, 3, H, W), float32.
    """
    # an old config.json has the list as a text
    resolutions = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
    width, height = select_best_resolution(image.size, resolutions)
    scale = min(width / image.width, height / image.height)
    fitted = (min(math.ceil(image.width * scale), width), min(math.ceil(image.height * scale), height))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(fitted), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    tile, edge = processor.crop_size["height"], processor.size["shortest_edge"]
    corners = [(x, y) for y in range(0, height, tile) for x in range(0, width, tile)]
    tiles = [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]
    views = [image.resize((edge, edge)), *tiles]
    return torch.stack([processor(view, return_tensors="pt")["pixel_values"][0] for view in views])


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> Any:
    """Tokenize a prompt whose ``<image>`` markers become one placeholder id each.

    The text around a marker is tokenized chunk by chunk, as LLaVA does, so ids equal those a LLaVA checkpoint was
    trained with (tokenizing in one go differs in the blank after a marker).

    Args:
        prompt: Text with any number of ``<image>`` markers.
        tokenizer: Any tokenizer; a beginning-of-sequence token it adds is kept once, in front.
        image_token_index: Id that stands for one image.
        return_tensors: None for a list, "pt" for a tensor (N,).

    Raises:
        ValueError: If ``return_tensors`` is neither None nor "pt".
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r} is not supported; use None or 'pt'.")
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)]
    # each chunk begins with its own beginning-of-sequence token; the first one's is kept
    bos = tokenizer.bos_token_id
    has_bos = bool(chunks[0]) and bos is not None and chunks[0][0] == bos
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids.append(image_token_index)
        ids.extend(chunk[1:] if has_bos and chunk and chunk[0] == bos else chunk)
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """Last component of a path, with its parent for a ``checkpoint-N`` folder (decides nothing here).

    >>> get_model_name_from_path("outputs/llava-v1.5-7b/checkpoint-100")
    'llava-v1.5-7b_checkpoint-100'
    """
    parts = model_path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Ends a row as soon as its answer holds one of some keywords.

    Works in both conventions of ``generate``, whether it shows the prompt in front of the answer or not: a prompt that
    is there is recognised by its ids and left out, so keywords in it do not count.

    Args:
        keywords: Texts to stop at, special tokens included.
        tokenizer: Tokenizer of the model.
        input_ids: Ids of the prompts, (B, N).
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: Tensor) -> None:
        self.keywords, self.tokenizer, self.input_ids = list(keywords), tokenizer, input_ids
        self.start_len = input_ids.shape[1]
        # Tokens that a keyword may stretch over: one per byte at most, and some that have no text.
        self._tail = max((len(keyword.encode()) for keyword in self.keywords), default=0) + 4

    def __call__(self, output_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Say which rows have ended, (B,) bool."""
        # only the tail is decoded: every step would otherwise decode the whole answer again
        start = max(self._answer_start(output_ids), output_ids.shape[1] - self._tail)
        texts = self.tokenizer.batch_decode(output_ids[:, start:], skip_special_tokens=False)
        ended = [any(keyword in text for keyword in self.keywords) for text in texts]
        return output_ids.new_tensor(ended).bool()

    def _answer_start(self, output_ids: Tensor) -> int:
        if output_ids.shape[1] < self.start_len:
            return 0
        prompts = self.input_ids.to(output_ids.device).repeat_interleave(len(output_ids) // len(self.input_ids), dim=0)
        return self.start_len if (output_ids[:, : self.start_len] == prompts).all() else 0
