"""LLaVA's calling convention, translated into that of transformers: prompts, images, answers, and the vision tower.

LLaVA writes the marker -200 (``IMAGE_TOKEN_INDEX``) where an image stands, passes images in many forms, and returns
answers alone; transformers writes the image token once per position, passes one tensor, and returns prompts as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.families import SELECT_FEATURES, HostModel, count_image_features
from llava.model.visual_tokens import image_lengths


@dataclass(frozen=True)
class ExpandedPrompts:
    """Prompts in which every position of an image has a token.

    Attributes:
        input_ids: Token ids, (B, N).
        attention_mask: 0 at padding, (B, N) int64.
        labels: Labels, ``IGNORE_INDEX`` at images and padding, (B, N); None where none were given.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None


def stack_images(images: Any) -> tuple[Tensor | None, list[int]]:
    """Stack images of any form that LLaVA accepts.

    Args:
        images: None; a tensor (images, 3, H, W) or (images, tiles, 3, H, W); or a list of tensors (3, H, W), or
            (tiles, 3, H, W) for an image that ``process_images`` cut into tiles.

    Returns:
        All views, (views, 3, H, W), None if there is no image; and the number of views of each image.

    Raises:
        TypeError: If the images are not floating-point tensors.
        ValueError: If a tensor has another number of dimensions.
    """
    items = list(images) if isinstance(images, Tensor | Sequence) else [] if images is None else [images]
    if not items:
        return None, []
    wrong = {
        str(item.dtype) if isinstance(item, Tensor) else type(item).__name__
        for item in items
        if not (isinstance(item, Tensor) and item.is_floating_point())
    }
    if wrong:
        raise TypeError(
            f"images holds {', '.join(sorted(wrong))}; floating-point tensors are needed. Pass PIL images through "
            "llava.mm_utils.process_images first."
        )
    shapes = [tuple(item.shape) for item in items]
    if any(len(shape) not in (3, 4) for shape in shapes):
        raise ValueError(
            f"images has shape {tuple(images.shape) if isinstance(images, Tensor) else shapes}; give "
            "(images, 3, H, W), (images, tiles, 3, H, W) or a list of (3, H, W) or (tiles, 3, H, W)."
        )
    # an image is a list of views, of one where it was not cut into tiles
    views = [item if item.dim() == 4 else item.unsqueeze(0) for item in items]
    return torch.cat(views), [len(item) for item in views]


def match_images(num_markers: Sequence[int], views: Tensor | None, num_views: list[int]) -> tuple[Tensor | None, list]:
    """Give each marker its image.

    A row without marker may bring a black image, which LLaVA's own collator gives to text; it is dropped.

    Args:
        num_markers: Markers of each row, B.
        views, num_views: As ``stack_images`` gives them; those that markers stand for are returned.

    Raises:
        ValueError: If there are more or fewer images than markers.
    """
    if len(num_views) == sum(num_markers):
        return views, num_views
    owners = [count > 0 for count in num_markers for _ in range(max(count, 1))]
    if views is not None and len(num_views) == len(owners):
        is_used = torch.tensor(owners).repeat_interleave(torch.tensor(num_views)).to(views.device)
        if not views[~is_used].any():  # black, so nobody meant them to be seen
            kept = [count for count, owner in zip(num_views, owners, strict=True) if owner]
            return (views[is_used] if kept else None), kept
    raise ValueError(
        f"{len(num_views)} images meet prompts with {list(num_markers)} image markers (id -200); give one image per "
        "marker, in the order of the rows. llava.mm_utils.tokenizer_image_token makes a marker of each <image>."
    )


def has_markers(input_ids: Tensor | None) -> bool:
    """Whether prompts hold image markers; a single position, as a decoding step has it, is not looked at."""
    return input_ids is not None and input_ids.shape[1] > 1 and bool((input_ids == IMAGE_TOKEN_INDEX).any())


def expand_markers(
    input_ids: Tensor,
    attention_mask: Tensor,
    lengths: Sequence[int],
    image_token_id: int,
    padding_id: int = 0,
    is_padded_left: bool = False,
    labels: Tensor | None = None,
) -> ExpandedPrompts:
    """Replace each marker by as many image tokens as its image takes, and pad anew.

    Args:
        input_ids: Token ids with markers, (B, M).
        attention_mask: True or 1 where a row has a token, wherever that is, (B, M).
        lengths: Positions of each image, in the order of the markers, row after row.
        image_token_id: Token id that marks an image position.
        padding_id: Token id of padding.
        is_padded_left: Whether rows end side by side, as generation needs it, or begin so.
        labels: Labels aligned with ``input_ids``, (B, M).

    Returns:
        The prompts, as long as the longest of them.

    Raises:
        ValueError: If there are more or fewer lengths than markers.

    >>> ids = torch.tensor([[1, -200, 7]])
    >>> expand_markers(ids, torch.ones_like(ids), lengths=[3], image_token_id=9).input_ids
    tensor([[1, 9, 9, 9, 7]])
    """
    is_kept = attention_mask.bool()
    ids = input_ids[is_kept]  # (tokens of all rows), row after row
    is_marker = ids == IMAGE_TOKEN_INDEX
    if int(is_marker.sum()) != len(lengths):
        raise ValueError(f"{int(is_marker.sum())} markers meet {len(lengths)} images; give one image per marker.")
    repeats = torch.ones_like(ids)
    repeats[is_marker] = ids.new_tensor(lengths)
    row_lengths = torch.zeros_like(input_ids).masked_scatter(is_kept, repeats).sum(dim=1, keepdim=True)  # (B, 1)
    longest = int(row_lengths.max())
    positions = torch.arange(longest, device=ids.device).unsqueeze(0)
    is_token = positions >= longest - row_lengths if is_padded_left else positions < row_lengths  # (B, N)

    def spread(values: Tensor, at_images: int, at_padding: int) -> Tensor:
        padded = values.new_full(is_token.shape, at_padding)
        padded[is_token] = values.masked_fill(is_marker, at_images).repeat_interleave(repeats)
        return padded

    expanded_labels = None if labels is None else spread(labels[is_kept], IGNORE_INDEX, IGNORE_INDEX)
    return ExpandedPrompts(spread(ids, image_token_id, padding_id), is_token.long(), expanded_labels)


def infer_attention_mask(input_ids: Tensor, padding_id: int | None) -> Tensor:
    """Infer the mask of prompts that came without one, (B, N) bool: False where a row begins or ends with padding.

    ``padding_id`` is None where padding cannot be told from text; then there is none.
    """
    if padding_id is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    is_text = input_ids != padding_id
    # padding inside a row is text: some token has come before, and some will come
    return (is_text.cumsum(dim=1) > 0) & (is_text.flip(1).cumsum(dim=1).flip(1) > 0)


def images_per_row(input_ids: Tensor, image_token_id: int, num_images: int) -> list[int]:
    """Count the images of each row of expanded prompts; arguments and errors are those of ``image_lengths``."""
    ends = torch.tensor(image_lengths(input_ids, image_token_id, num_images)).cumsum(0)
    row_ends = (input_ids == image_token_id).sum(dim=1).cumsum(0).cpu()
    rows = torch.searchsorted(row_ends, ends)  # the first row that ends no earlier than the image
    return rows.bincount(minlength=len(input_ids)).tolist()


# --- answers without prompts ---


class AnswerStreamer(BaseStreamer):
    """A streamer that passes on the answer alone: token ids, first the prompt's as (1, 0), then those that come."""

    def __init__(self, streamer: Any, prompt_length: int) -> None:
        self.streamer, self.num_hidden = streamer, prompt_length

    def put(self, value: Tensor) -> None:
        """Pass token ids on, without those of the prompt, which come first."""
        self.streamer.put(value[..., self.num_hidden :])
        self.num_hidden = 0

    def end(self) -> None:
        """Pass on that the answer is complete."""
        self.streamer.end()


def show_answers_only(options: dict[str, Any], prompt_length: int) -> dict[str, Any]:
    """Wrap the stopping criteria, logits processors and streamer of ``generate`` so that they see answers only."""

    def hide_prompts(inner: Callable) -> Any:
        # a function, because transformers looks for further arguments in the signature of a processor's ``__call__``
        return lambda input_ids, scores, **kwargs: inner(input_ids[:, prompt_length:], scores, **kwargs)

    wrapped = dict(options)
    if wrapped.get("streamer") is not None:
        wrapped["streamer"] = AnswerStreamer(wrapped["streamer"], prompt_length)
    for name, kind in (("stopping_criteria", StoppingCriteriaList), ("logits_processor", LogitsProcessorList)):
        if wrapped.get(name) is not None:
            wrapped[name] = kind(map(hide_prompts, wrapped[name]))
    return wrapped


def drop_prompts(output: Any, prompt_length: int) -> Any:
    """Keep the answers of a result of ``generate``: a tensor (B, N), or an output with ``sequences`` (B, N)."""
    if isinstance(output, Tensor):
        return output[:, prompt_length:]
    output.sequences = output.sequences[:, prompt_length:]
    return output


# --- vision tower ---


class VisionTowerFacade:
    """A loaded model's vision tower under the names that LLaVA's users know; all else is the tower module's own.

    Attributes:
        is_loaded: Always True; a checkpoint is loaded with its tower.
        vision_tower: The module, a CLIP vision model.
        image_processor: Its image processor; None for a model that was built by hand.
        select_layer: Layer that features are taken from, counted from the end if negative; or a list of them.
        select_feature: "patch" without, "cls_patch" with the class token.
        hidden_size: Width of the features.
        num_patches: Features of an image.
        num_patches_per_side: Patches along an edge of the image.
    """

    is_loaded = True

    def __init__(self, model: HostModel, image_processor: Any) -> None:
        config: Any = model.config
        vision = config.vision_config
        self.vision_tower, self.image_processor = model.model.vision_tower, image_processor
        self.select_layer = config.vision_feature_layer
        self._layers = [self.select_layer] if isinstance(self.select_layer, int) else list(self.select_layer)
        names = {ours: theirs for theirs, ours in SELECT_FEATURES.items()}
        self.select_feature = names[config.vision_feature_select_strategy]
        self.hidden_size = vision.hidden_size * len(self._layers)
        self.num_patches = count_image_features(config)
        self.num_patches_per_side = vision.image_size // vision.patch_size

    def __getattr__(self, name: str) -> Any:
        if name == "vision_tower":  # not set yet, as in unpickling
            raise AttributeError(name)
        return getattr(self.vision_tower, name)

    def __call__(self, images: Tensor) -> Tensor:
        """Give features before the projector: (images, 3, H, W) to (images, patches, hidden size)."""
        tower = self.vision_tower
        states = tower(images.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
        first = 1 if self.select_feature == "patch" else 0  # the class token stands first
        return torch.cat([states[layer][:, first:] for layer in self._layers], dim=-1).to(images.dtype)
