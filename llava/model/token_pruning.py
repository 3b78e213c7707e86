"""Visual-token pruning: the decoder reads fewer tokens per image than the vision tower gives.

The prompt says how many: an image that takes n positions is given n tokens, chosen by the model's pruner between
projector and decoder. So all that is aligned with positions (labels, masks, turn ids, the cache) stays aligned, routing
sees image positions and pixels as ever, and an image that takes all its positions is read bit for bit as in LLaVA.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzzyroe.attach import find_decoder, find_router
from fuzzyroe.routing_state import RoutingState
from llava.constants import IGNORE_INDEX, PADDING_TURN
from llava.model.families import HostInnerModel, HostModel, count_image_features, get_image_token_id
from llava.model.visual_tokens import VisualTokens, check_prunable, encode_images, first_positions, image_lengths

# --- pruners ---

TokenPruner = Callable[[VisualTokens, int], Tensor]
"""Turns the P tokens of images into ``num_kept`` per image, 1 <= ``num_kept`` < P; gives (images, num_kept, D)."""


@dataclass(frozen=True)
class DominantMerged:
    """Keeps the tokens that the class token attends to, and merges the others by the similarity of their keys.

    Of the kept number, ``merged_share`` are spread evenly over the tokens that do not dominate; each becomes the mean
    of itself and of those that are more like it than like the others so chosen. The question plays no part. The kept
    tokens stand in the order of their patches.

    Attributes:
        merged_share: Share of the kept tokens that are merged ones, in [0, 1).

    Reference:
        VisionZip (arXiv:2412.04467), "dominant" and "contextual" tokens; 54 and 10 of 64 there. It merges in front of
        the projector and puts merged tokens last.
    """

    merged_share: float = 10 / 64

    def __post_init__(self) -> None:
        if not 0 <= self.merged_share < 1:
            raise ValueError(f"merged_share is {self.merged_share}; choose a share in [0, 1).")

    def __call__(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Give dominant and merged tokens, (images, num_kept, D)."""
        num_merged = min(round(num_kept * self.merged_share), num_kept - 1)
        ranked = tokens.class_attention.argsort(dim=1, descending=True, stable=True)
        dominant, rest = ranked[:, : num_kept - num_merged], ranked[:, num_kept - num_merged :].sort(dim=1).values
        targets = rest[:, spread(num_merged, rest.shape[1], rest.device)]  # (images, num_merged)
        merged = _merge(tokens, rest, targets)
        kept = torch.cat([dominant, targets], dim=1)
        features = torch.cat([_take(tokens.features, dominant), merged.to(tokens.features.dtype)], dim=1)
        # back into the order of the patches, which position ids stand for
        return _take(features, kept.argsort(dim=1))


def keep_even(tokens: VisualTokens, num_kept: int) -> Tensor:
    """Keep every (P / num_kept)-th token, (images, num_kept, D): the baseline that a choice by evidence has to beat."""
    return tokens.features[:, spread(num_kept, tokens.features.shape[1], tokens.features.device)]


PRUNERS: dict[str, TokenPruner] = {"dominant_merged": DominantMerged(), "even": keep_even}
"""Pruners by name."""


def get_pruner(name: str) -> TokenPruner:
    """Look a pruner up; KeyError lists the known ones."""
    if name not in PRUNERS:
        raise KeyError(f"Token pruner '{name}' is unknown; use one of {', '.join(PRUNERS)}.")
    return PRUNERS[name]


def spread(number: int, length: int, device: torch.device) -> Tensor:
    """Give the middles of ``number`` equal parts of ``range(length)``, (number,) int64, ascending, all different."""
    return (torch.arange(number, device=device) * 2 + 1) * length // (2 * max(number, 1))


def _merge(tokens: VisualTokens, members: Tensor, targets: Tensor) -> Tensor:
    """Average the members, (images, R), that are most like each target, (images, M); give (images, M, D), float32."""
    if targets.shape[1] == 0:
        return tokens.features.new_zeros(len(targets), 0, tokens.features.shape[2], dtype=torch.float32)
    keys = F.normalize(tokens.keys, dim=-1)
    similarity = _take(keys, members) @ _take(keys, targets).transpose(1, 2)  # (images, R, M)
    # a target belongs to itself, even where another one has the same key
    is_target = members.unsqueeze(2) == targets.unsqueeze(1)
    nearest = similarity.masked_fill(is_target, torch.inf).argmax(dim=2)  # (images, R)
    weights = F.one_hot(nearest, targets.shape[1]).float()  # (images, R, M)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return weights.transpose(1, 2) @ _take(tokens.features.float(), members)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Pick entries, (images, n), of values, (images, P, width), for every image; (images, n, width)."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


# --- a model that prunes ---


def set_token_pruning(model: HostModel, num_kept: int | None, pruner: str = "dominant_merged") -> None:
    """Make a model read fewer tokens per image from now on; None undoes it.

    Both arguments go into ``model.config``, so a checkpoint that is saved now is read so again. Prompts are encoded by
    ``count_image_tokens(model.config)``, which gives the new number; encode them after this call. A prompt that was
    encoded before is read in full, unless ``prune_inputs`` shortens it.

    Args:
        model: Loaded model, dense or routed.
        num_kept: Tokens per image, from 1 to ``count_image_features``.
        pruner: Name in ``PRUNERS``.

    Raises:
        ValueError: If the number is out of range, or the vision tower has no class token to go by.
        TypeError: If the model is stock LLaVA, of transformers' own class.
        KeyError: If the pruner is unknown.
    """
    config: Any = model.config
    if num_kept is None:
        for name in ("num_visual_tokens", "token_pruner"):
            config.__dict__.pop(name, None)
        return
    check_prunable(config)
    # ``LlavaLlamaForCausalLM.forward`` prunes; stock LLaVA names this argument, and encodes images before any prompt
    if "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters:
        raise TypeError(
            f"The model is a {type(model).__name__}, whose generate encodes images in full; token pruning needs a "
            "LlavaLlamaForCausalLM. Load the model by load_checkpoint."
        )
    if not 1 <= num_kept <= count_image_features(config):
        raise ValueError(
            f"num_kept is {num_kept}; an image keeps 1 to {count_image_features(config)} tokens. Choose inside."
        )
    get_pruner(pruner)
    config.num_visual_tokens, config.token_pruner = num_kept, pruner


def has_token_pruning(model: HostModel) -> bool:
    """Whether ``set_token_pruning`` was called on a model, or on the one that its checkpoint was saved from."""
    return getattr(model.config, "num_visual_tokens", None) is not None


def embed_prompts(
    llava_model: HostInnerModel,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    routing: RoutingState | None = None,
    **options: Any,
) -> Tensor:
    """Give the states before the first decoder layer: embeddings, with the tokens of each image in their positions.

    Args:
        llava_model: The inner model of LLaVA, ``model.model``, with token pruning or without.
        input_ids: Token ids with images expanded to the number of tokens they are to have, (B, N).
        pixel_values: Images in the order of the rows, (images, 3, H, W); None for text.
        routing: State of these prompts, which is told how many images each row has where their lengths differ.
        **options: Passed to ``get_image_features``.

    Returns:
        States, (B, N, D); without pruning those of LLaVA's own forward bit for bit.

    Raises:
        ValueError: If an image has more positions than features.
    """
    # embeddings first, then the tower, as in the stock forward: a sharded model gathers weights in this order
    embeddings = llava_model.get_input_embeddings()(input_ids)
    if pixel_values is None:
        return embeddings
    config: Any = llava_model.config
    image_token, num_features = get_image_token_id(config), count_image_features(config)
    lengths = image_lengths(input_ids, image_token, len(pixel_values))
    if max(lengths) > num_features:
        raise ValueError(
            f"An image has {max(lengths)} image tokens, but {num_features} features; expand it to that many or fewer."
        )
    if min(lengths) == num_features:
        output = llava_model.get_image_features(pixel_values, return_dict=True, **options)
        features = torch.cat(list(output.pooler_output))
    else:
        features = _prune(encode_images(llava_model, pixel_values, **options), lengths, get_pruner(config.token_pruner))
    if routing is not None and len(set(lengths)) > 1:
        routing.images_per_row = first_positions(input_ids, image_token).sum(dim=1)
    is_image = (input_ids == image_token).unsqueeze(-1)
    return embeddings.masked_scatter(is_image, features.to(embeddings.device, embeddings.dtype))


@torch.no_grad()
def plan_by_router(model: HostModel, inputs: dict[str, Any]) -> tuple[Tensor, RoutingState]:
    """Read images and let the router plan, for a batch of encoded prompts; no decoder layer runs.

    Args:
        model: Model with a router that decides before the first layer.
        inputs: ``input_ids`` and ``attention_mask``, (B, N), and where there are images ``pixel_values``.

    Returns:
        States before the first decoder layer, (B, N, D); routing state with the router's result.
    """
    routing = RoutingState.from_batch(inputs, get_image_token_id(model.config))
    states = embed_prompts(model.model, inputs["input_ids"], inputs.get("pixel_values"), routing)
    find_decoder(model).router.plan(states, routing)
    return states, routing


def _prune(tokens: VisualTokens, lengths: list[int], pruner: TokenPruner) -> Tensor:
    """Prune each image to its length, those of one length together; (sum of the lengths, D), in order."""
    pruned: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        images = [index for index, own in enumerate(lengths) if own == length]
        chosen = tokens.select(torch.tensor(images, device=tokens.features.device))
        features = chosen.features if length == tokens.features.shape[1] else pruner(chosen, length)
        pruned.update(zip(images, features, strict=True))
    return torch.cat([pruned[index] for index in range(len(lengths))])


# --- prompts with shorter images ---

PADDING = {"attention_mask": 0, "labels": IGNORE_INDEX, "turn_ids": PADDING_TURN, "image_mask": 0, "question_mask": 0}
"""Value at padding in each tensor of one entry per position, (B, N), besides the token ids."""


def prune_inputs(model: HostModel, inputs: dict[str, Any], num_kept: int | Tensor) -> dict[str, Any]:
    """Shorten the images of encoded prompts or of a training batch, for a model with token pruning.

    Args:
        model: Model on which ``set_token_pruning`` was called.
        inputs, num_kept: As for ``shorten_images``.

    Raises:
        ValueError: If the model has no token pruning, or the inputs or numbers do not fit.
    """
    _require_pruning(model)
    config: Any = model.config
    candidates = (config.text_config.pad_token_id, getattr(config, "pad_token_id", None), 0)
    padding = next(candidate for candidate in candidates if candidate is not None)
    return shorten_images(inputs, get_image_token_id(config), count_image_features(config), num_kept, padding)


@torch.no_grad()
def plan_visual_tokens(model: HostModel, inputs: dict[str, Any], counts: Sequence[int]) -> Tensor:
    """Let the router's score choose how many tokens each image keeps: the higher the score, the more.

    The percentile of the score, in [0, 1], picks from ``counts``, each for an equal share of prompts like those of
    calibration; no decoder layer runs.

    Args:
        model: Model with token pruning, routed by scores with ``percentiles``, as the fuzzy router has them.
        inputs: Encoded prompts with all tokens of each image, ``input_ids`` (B, N) and ``pixel_values``.
        counts: Numbers of tokens, ascending.

    Returns:
        Tokens for each image, (images,) int64, for ``prune_inputs``; those of one row are equal.

    Raises:
        ValueError: If the counts descend, or the router has no scores.
    """
    _require_pruning(model)
    if len(counts) == 0 or list(counts) != sorted(counts):
        raise ValueError(f"counts is {list(counts)}; a higher score keeps more, so give one number or more, ascending.")
    router = find_router(model)
    if router is None or not hasattr(router, "percentiles"):
        name = "no router" if router is None else f"a {type(router).__name__}"
        raise ValueError(f"The model has {name}, which gives no scores; plan with a fuzzy router.")
    _, routing = plan_by_router(model, inputs)
    percentiles = router.percentiles(routing.result.scores)[:, 0]  # (B,)
    level = (percentiles * len(counts)).long().clamp(max=len(counts) - 1)
    is_image = inputs["input_ids"] == get_image_token_id(model.config)
    images_per_row = is_image.sum(dim=1) // count_image_features(model.config)
    return torch.tensor(list(counts), device=level.device)[level].repeat_interleave(images_per_row.to(level.device))


def shorten_images(
    batch: dict[str, Any], image_token_id: int, image_length: int, num_kept: int | Tensor, padding_id: int
) -> dict[str, Any]:
    """Let images take fewer positions; every other position stays, with all that is aligned with it.

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
    # images stand in the order of the rows, so a running count tells image and position within it
    order = is_image.flatten().cumsum(0).view_as(is_image) - 1
    limit = kept_per_image[(order // image_length).clamp(min=0)]
    keep = mask.bool() & (~is_image | (order % image_length < limit))
    is_left = bool((mask[:, 0] == 0).any()) or (bool(mask[:, -1].all()) and "labels" not in batch)
    # a stable sort moves kept positions side by side, at the end or at the beginning of the row
    longest = int(keep.sum(dim=1).max())
    index = keep.long().argsort(dim=1, stable=True, descending=not is_left)
    index = index[:, -longest:] if is_left else index[:, :longest]  # (B, N')
    is_token = keep.gather(1, index)
    shorter = {"attention_mask": mask, **batch}
    for name, padding in {"input_ids": padding_id, **PADDING}.items():
        if shorter.get(name) is not None:
            shorter[name] = shorter[name].gather(1, index).masked_fill(~is_token, padding)
    return shorter


def _check_numbers(num_kept: int | Tensor, num_images: int, image_length: int) -> Tensor:
    """Give the number of each image, (images,) int64; refuse those that do not fit."""
    numbers = torch.as_tensor(num_kept, dtype=torch.long)
    if numbers.dim() > 1 or (numbers.dim() == 1 and len(numbers) != num_images):
        raise ValueError(
            f"num_kept has shape {tuple(numbers.shape)} for {num_images} images; give one number for all or for each."
        )
    if numbers.numel() and not 1 <= int(numbers.min()) <= int(numbers.max()) <= image_length:
        raise ValueError(
            f"num_kept is between {int(numbers.min())} and {int(numbers.max())}; an image keeps 1 to {image_length} "
            "tokens. Choose inside."
        )
    return numbers.expand(num_images)


def _require_pruning(model: HostModel) -> None:
    if not has_token_pruning(model):
        raise ValueError("The model has no token pruning; call set_token_pruning first.")
