"""Image positions of a batch: how many each image takes, and a shorter batch in which it takes fewer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, PADDING_TURN

PADDING = {"attention_mask": 0, "labels": IGNORE_INDEX, "turn_ids": PADDING_TURN, "image_mask": 0, "question_mask": 0}
"""What stands at padding in each tensor of one entry per position, (B, N), besides the token ids."""


def first_positions(input_ids: Tensor, image_token_id: int) -> Tensor:
    """Mark the first of each run of image tokens, (B, N) bool; a run does not go on in the next row."""
    is_image = input_ids == image_token_id
    is_first = is_image.clone()
    is_first[:, 1:] &= ~is_image[:, :-1]
    return is_first


def image_lengths(input_ids: Tensor, image_token_id: int, num_images: int) -> list[int]:
    """Count the positions of each image.

    Neighbouring image tokens are one image; where that does not give as many images as there are, all of them are of
    one length.

    Args:
        input_ids: Token ids with images expanded, (B, N).
        image_token_id: Token id of image positions.
        num_images: Images of the batch, at least 1, in the order of its rows.

    Returns:
        Positions of each image.

    Raises:
        ValueError: If the image tokens cannot be dealt out so.
    """
    is_image = input_ids == image_token_id
    run = (
        first_positions(input_ids, image_token_id).flatten().cumsum(0)[is_image.flatten()] - 1
    )  # which run each image token is part of
    lengths = run.bincount().tolist() if len(run) else []
    if len(lengths) == num_images:
        return lengths
    length, surplus = divmod(len(run), num_images)
    if length == 0 or surplus or any(count % length for count in lengths):
        raise ValueError(
            f"{num_images} images meet {len(run)} image tokens in runs of {lengths}; allowed is one run per image, or "
            "equally many tokens for each. Put a token between images that keep different numbers."
        )
    return [length] * num_images


def shorten_images(
    batch: dict[str, Any], image_token_id: int, image_length: int, num_kept: int | Tensor, padding_id: int
) -> dict[str, Any]:
    """Let images take fewer positions; everything else stays, and every position keeps what belongs to it.

    Args:
        batch: ``input_ids``, (B, N), with ``image_length`` image tokens per image; of ``attention_mask``, ``labels``,
            ``turn_ids``, ``image_mask`` and ``question_mask``, (B, N), whatever there is; other entries pass unchanged.
        image_token_id: Token id of image positions.
        image_length: Positions P of each image in ``batch``.
        num_kept: Positions that each image keeps, in [1, P], one number or one per image, (images,).
        padding_id: Token id of padding.

    Returns:
        A new batch, padded to its longest row on the side on which the given one is; where that has no padding, on the
        right for training, with ``labels``, and on the left otherwise. It has an ``attention_mask``. Where nothing is
        to be dropped, the batch as given.

    Raises:
        ValueError: If a row holds part of an image, a number is out of range, or positions were numbered before.
    """
    input_ids = batch["input_ids"]
    is_image = input_ids == image_token_id
    counts = is_image.sum(dim=1)
    if bool((counts % image_length).any()):
        raise ValueError(
            f"Rows have {counts.tolist()} image tokens; allowed are multiples of {image_length} per row. Prune a batch "
            "that was encoded with all tokens of its images."
        )
    if "position_ids" in batch or "inputs_embeds" in batch:
        raise ValueError("position_ids and inputs_embeds are those of the longer batch; leave them out.")
    kept_per_image = _check_numbers(num_kept, int(counts.sum()) // image_length, image_length).to(input_ids.device)
    if bool((kept_per_image == image_length).all()):
        return dict(batch)
    mask = batch.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    order = is_image.flatten().cumsum(0).view_as(is_image) - 1  # images stand in the order of the rows
    rank = order % image_length
    limit = kept_per_image[(order // image_length).clamp(min=0)]
    keep = mask.bool() & (~is_image | (rank < limit))
    is_left = bool((mask[:, 0] == 0).any()) or (bool(mask[:, -1].all()) and "labels" not in batch)
    index = _pack(keep, is_left)  # (B, N')
    is_token = keep.gather(1, index)
    shorter = {"attention_mask": mask, **batch}
    for name, padding in {"input_ids": padding_id, **PADDING}.items():
        if shorter.get(name) is not None:
            shorter[name] = shorter[name].gather(1, index).masked_fill(~is_token, padding)
    return shorter


def _check_numbers(num_kept: int | Tensor, num_images: int, image_length: int) -> Tensor:
    numbers = torch.as_tensor(num_kept, dtype=torch.long)
    if numbers.dim() > 1 or (numbers.dim() == 1 and len(numbers) != num_images):
        raise ValueError(
            f"num_kept has shape {tuple(numbers.shape)} for {num_images} images; give one number for all, or one per "
            "image."
        )
    if numbers.numel() and not 1 <= int(numbers.min()) <= int(numbers.max()) <= image_length:
        raise ValueError(
            f"num_kept is between {int(numbers.min())} and {int(numbers.max())}; an image keeps 1 to {image_length} "
            "tokens. Choose inside."
        )
    return numbers.expand(num_images)


def _pack(keep: Tensor, is_left: bool) -> Tensor:
    """Give which positions the columns of a shorter batch are taken from, (B, N') int64, kept ones side by side."""
    length = int(keep.sum(dim=1).max())
    order = keep.long().argsort(dim=1, stable=True, descending=not is_left)
    return order[:, keep.shape[1] - length :] if is_left else order[:, :length]
