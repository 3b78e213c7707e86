"""Visual-token pruning: the decoder reads fewer tokens per image than the vision tower gives.

How many, the prompt says: an image that takes n positions is given n tokens, chosen by the model's pruner between
projector and decoder. So whatever is aligned with positions (labels, masks, turn ids, the cache) needs no care, routing
sees image positions and pixels as ever, and an image that takes all its positions goes the stock way, bit for bit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaModel

from fuzzyroe.attach import find_decoder
from fuzzyroe.routing_state import RoutingState
from llava.image_tokens import count_image_features
from llava.model.image_positions import first_positions, image_lengths, shorten_images
from llava.model.routing import prompt_routing
from llava.model.token_pruners import TokenPruner, get_pruner
from llava.model.visual_tokens import VisualTokens, check_prunable, encode_images


class PrunesTokens:
    """Mixin in front of a class of inner LLaVA models; ``set_token_pruning`` puts it there."""

    base_class: type[LlavaModel]

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        """As the forward of LLaVA, for prompts whose images take at most as many positions as they have features.

        Args:
            input_ids: Token ids with images expanded to the number of tokens they are to have, (B, N).
            pixel_values: Images in the order of the rows, (images, 3, H, W).
            **kwargs: As for LLaVA.

        Returns:
            What LLaVA gives; ``image_hidden_states`` is None where an image was pruned.

        Raises:
            ValueError: If an image has more positions than features.
        """
        if input_ids is None or pixel_values is None:
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        lengths = _lengths(self.config, input_ids, pixel_values)
        if min(lengths) == count_image_features(self.config):
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        names = ("vision_feature_layer", "vision_feature_select_strategy")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        embeddings = embed_prompts(self, input_ids, pixel_values, kwargs.get("routing"), **options)
        return super().forward(**{**kwargs, "inputs_embeds": embeddings})


def embed_prompts(
    llava_model: LlavaModel,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    routing: RoutingState | None = None,
    **options: Any,
) -> Tensor:
    """Give the states before the first decoder layer: embeddings, with the tokens of each image in their places.

    Args:
        llava_model: The inner model of LLaVA, ``model.model``, with token pruning or without.
        input_ids: Token ids with images expanded to the number of tokens they are to have, (B, N).
        pixel_values: Images in the order of the rows, (images, 3, H, W); None for text.
        routing: State of these prompts, which is told how many images each row has where their lengths differ.
        **options: Passed to ``get_image_features``.

    Returns:
        States, (B, N, D), those of the model's own forward bit for bit.

    Raises:
        ValueError: If an image has more positions than features.
    """
    # embeddings first, then the tower, as in the stock forward: a sharded model gathers weights in this order
    embeddings = llava_model.get_input_embeddings()(input_ids)
    if pixel_values is None:
        return embeddings
    config = llava_model.config
    lengths = _lengths(config, input_ids, pixel_values)
    if min(lengths) == count_image_features(config):
        features = torch.cat(
            list(llava_model.get_image_features(pixel_values, return_dict=True, **options).pooler_output)
        )
    else:
        features = _prune(encode_images(llava_model, pixel_values, **options), lengths, get_pruner(config.token_pruner))
    if routing is not None and len(set(lengths)) > 1:
        routing.images_per_row = first_positions(input_ids, config.image_token_id).sum(dim=1)
    is_image = (input_ids == config.image_token_id).unsqueeze(-1)
    return embeddings.masked_scatter(is_image, features.to(embeddings.device, embeddings.dtype))


def set_token_pruning(
    model: LlavaForConditionalGeneration, num_kept: int | None, pruner: str = "dominant_merged"
) -> None:
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
    inner, config = model.model, model.config
    base = type(inner).base_class if isinstance(inner, PrunesTokens) else type(inner)
    if num_kept is None:
        inner.__class__ = base
        for name in ("num_visual_tokens", "token_pruner"):
            config.__dict__.pop(name, None)
        return
    check_prunable(config)
    _refuse_early_encoding(model)
    if not 1 <= num_kept <= count_image_features(config):
        raise ValueError(
            f"num_kept is {num_kept}; an image keeps 1 to {count_image_features(config)} tokens. Choose inside."
        )
    get_pruner(pruner)
    inner.__class__ = _pruning_class(base)
    config.num_visual_tokens, config.token_pruner = num_kept, pruner


def resume_token_pruning(model: LlavaForConditionalGeneration) -> None:
    """Prune again as the configuration of a loaded checkpoint says, if it says anything.

    Raises:
        ValueError, TypeError, KeyError: As ``set_token_pruning``.
    """
    number = getattr(model.config, "num_visual_tokens", None)
    if number is not None:
        set_token_pruning(model, number, getattr(model.config, "token_pruner", "dominant_merged"))


def prune_inputs(
    model: LlavaForConditionalGeneration, inputs: dict[str, Any], num_kept: int | Tensor
) -> dict[str, Any]:
    """Shorten the images of encoded prompts or of a training batch, for a model with token pruning.

    Args:
        model: Model on which ``set_token_pruning`` was called.
        inputs: As for the model, with all tokens of each image, see ``shorten_images``.
        num_kept: Tokens that each image keeps, one number or one per image, (images,).

    Returns:
        Inputs whose images take ``num_kept`` positions.

    Raises:
        ValueError: If the model has no token pruning, or the inputs or numbers do not fit.
    """
    _require_pruning(model)
    config = model.config
    padding = config.text_config.pad_token_id
    if padding is None:
        padding = getattr(config, "pad_token_id", None)
    return shorten_images(
        inputs, config.image_token_id, count_image_features(config), num_kept, 0 if padding is None else padding
    )


@torch.no_grad()
def plan_visual_tokens(model: LlavaForConditionalGeneration, inputs: dict[str, Any], counts: Sequence[int]) -> Tensor:
    """Let the router's score choose how many tokens each image keeps: the higher the score, the more.

    Vision tower and projector run, then the router on prompts with all tokens; no decoder layer does. The percentile of
    the score, in [0, 1], picks from ``counts``, each for an equal share of prompts like those of calibration.

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
    router = getattr(find_decoder(model), "router", None)
    if not hasattr(router, "percentiles"):
        name = "no router" if router is None else f"a {type(router).__name__}"
        raise ValueError(f"The model has {name}, which gives no scores; plan with a fuzzy router.")
    config, input_ids, pixel_values = model.config, inputs["input_ids"], inputs["pixel_values"]
    routing = prompt_routing(input_ids, inputs.get("attention_mask"), config.image_token_id, pixel_values)
    router.plan(embed_prompts(model.model, input_ids, pixel_values, routing), routing)
    percentiles = router.percentiles(routing.scores)[:, 0]  # (B,)
    level = (percentiles * len(counts)).long().clamp(max=len(counts) - 1)
    images_per_row = (input_ids == config.image_token_id).sum(dim=1) // count_image_features(config)
    return torch.tensor(list(counts), device=level.device)[level].repeat_interleave(images_per_row.to(level.device))


@functools.cache
def _pruning_class(base: type[LlavaModel]) -> type[LlavaModel]:
    """Give the pruning subclass of an inner model's class, the same one each time.

    It has the name of its base: transformers looks up by name how weights are called in a saved checkpoint.
    """
    return type(base.__name__, (PrunesTokens, base), {"base_class": base, "__module__": base.__module__})


def _lengths(config: Any, input_ids: Tensor, pixel_values: Tensor) -> list[int]:
    """Positions of each image, none of which has more than features."""
    num_features = count_image_features(config)
    lengths = image_lengths(input_ids, config.image_token_id, len(pixel_values))
    if max(lengths) > num_features:
        raise ValueError(
            f"An image has {max(lengths)} image tokens, but {num_features} features; expand it to {num_features} or "
            "fewer."
        )
    return lengths


def _prune(tokens: VisualTokens, lengths: list[int], pruner: TokenPruner) -> Tensor:
    """Prune each image to its length, those of one length together; (sum of the lengths, D), in order."""
    pruned: dict[int, Tensor] = {}
    for length in sorted(set(lengths)):
        images = [index for index, own in enumerate(lengths) if own == length]
        chosen = tokens.select(torch.tensor(images, device=tokens.features.device))
        features = chosen.features if length == tokens.features.shape[1] else pruner(chosen, length)
        pruned.update(zip(images, features, strict=True))
    return torch.cat([pruned[index] for index in range(len(lengths))])


def _refuse_early_encoding(model: LlavaForConditionalGeneration) -> None:
    """Raise TypeError if ``generate`` encodes images itself, before any prompt is read (transformers 5.18 and later).

    It does where ``forward`` names that argument, as stock LLaVA does and ``LlavaLlamaForCausalLM`` does not.
    """
    if "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters:
        raise TypeError(
            f"The model is a {type(model).__name__}, whose generate encodes images in full; token pruning needs a "
            "LlavaLlamaForCausalLM. Load the model by load_checkpoint."
        )


def _require_pruning(model: LlavaForConditionalGeneration) -> None:
    if not isinstance(model.model, PrunesTokens):
        raise ValueError("The model has no token pruning; call set_token_pruning first.")
