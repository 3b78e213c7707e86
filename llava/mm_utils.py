"""Helpers around one image and one prompt, a public contract with lmms-eval."""

from __future__ import annotations

from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX


def expand2square(image: Any, background_color: tuple[int, int, int]) -> Any:
    """Centre a PIL image on a square canvas of its longer side, filled with ``background_color``."""
    from PIL import Image

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
        model_cfg: Configuration with ``image_aspect_ratio``: "pad" centres each image on a square of the processor's
            mean colour first; anything else leaves resizing and cropping to the processor.

    Returns:
        Pixel values, (number of images, 3, height, width), float32.
    """
    if getattr(model_cfg, "image_aspect_ratio", None) == "pad":
        background = tuple(int(channel * 255) for channel in image_processor.image_mean)
        images = [expand2square(image.convert("RGB"), background) for image in images]
    else:
        images = [image.convert("RGB") for image in images]
    return image_processor(images, return_tensors="pt")["pixel_values"]


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
    bos = tokenizer.bos_token_id
    has_bos = bool(chunks[0]) and bos is not None and chunks[0][0] == bos
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids.append(image_token_index)
        ids.extend(chunk[1:] if has_bos and chunk and chunk[0] == bos else chunk)
    if return_tensors is None:
        return ids
    import torch

    return torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """Last component of a path, with its parent for a ``checkpoint-N`` folder (decides nothing here)."""
    parts = model_path.strip("/").split("/")
    return f"{parts[-2]}_{parts[-1]}" if parts[-1].startswith("checkpoint-") and len(parts) > 1 else parts[-1]
