"""Routing on a LLaVA model: attaching it, planning prompts at inference, setting the budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import attach, find_decoder
from fuzzyroe.cache import has_started
from fuzzyroe.routers.base import Router
from fuzzyroe.routing_state import RoutingState


def attach_routing(
    model: LlavaForConditionalGeneration, router: Router, adapter_width: int, adapter_init: str = "zero"
) -> LlavaForConditionalGeneration:
    """Make the decoder layers of a LLaVA model skippable, in place.

    Args:
        model: Loaded model.
        router: What plans prompts at inference.
        adapter_width: Width of the skip adapters.
        adapter_init: "zero" (an untrained skip is the identity) or "xavier".
    """
    attach(model, adapter_width, adapter_init, router)
    model.model.register_forward_pre_hook(_describe_prompt, with_kwargs=True)
    return model


def set_budget(model: LlavaForConditionalGeneration, skip_rate: float | None) -> None:
    """Ask for a mean skip rate from now on; None switches routing off, which gives the dense model bit for bit.

    Raises:
        ValueError: If routing is not attached, or its router was not calibrated for such a rate.
    """
    router = getattr(find_decoder(model), "router", None)
    if router is None:
        if skip_rate is None:
            return
        raise ValueError(f"Skip rate {skip_rate} was asked of a dense checkpoint; load one that a stage has routed.")
    if skip_rate is not None:
        router.set_budget(skip_rate)
    router.enabled = skip_rate is not None


def prompt_routing(
    input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int, pixel_values: Tensor | None = None
) -> RoutingState:
    """The routing state of prompts: what follows the last image token is the question.

    Args:
        input_ids: Token ids with images expanded, (B, N).
        attention_mask: 0 at padding, (B, N); None for none.
        image_token_id: Token id of image positions.
        pixel_values: Their images, (images, 3, H, W); None for none.

    Returns:
        A hard state with one turn per example, still to be planned.
    """
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    image_mask = (input_ids == image_token_id) & is_token
    images_from_here = image_mask.flip(1).cumsum(1).flip(1)  # (B, N), image positions at or behind each position
    question_mask = is_token & (images_from_here == 0)
    turn_ids = question_mask.long() - (~is_token).long()
    return RoutingState(turn_ids, image_mask, question_mask, "hard", num_turns=1, pixel_values=pixel_values)


def _describe_prompt(llava_model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: at prefill, tell the router where image and question are, which only token ids know."""
    router = getattr(find_decoder(llava_model), "router", None)  # None once detached
    input_ids = kwargs.get("input_ids")
    is_silent = llava_model.training or not getattr(router, "enabled", False) or kwargs.get("routing") is not None
    if is_silent or input_ids is None or has_started(kwargs.get("past_key_values")):
        return None
    image_token_id, pixel_values = llava_model.config.image_token_index, kwargs.get("pixel_values")
    state = prompt_routing(input_ids, kwargs.get("attention_mask"), image_token_id, pixel_values)
    return args, {**kwargs, "routing": state}
