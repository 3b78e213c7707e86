"""Routing on a LLaVA model: attaching it, planning prompts at inference, setting the budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import attach, detach, find_decoder
from fuzzyroe.cache import has_started
from fuzzyroe.routers.base import Router
from fuzzyroe.routing_state import RoutingState


def attach_routing(
    model: LlavaForConditionalGeneration,
    router: Router,
    adapter_width: int,
    adapter_init: str = "zero",
    skip_unit: str = "layer",
) -> LlavaForConditionalGeneration:
    """Make the decoder layers of a LLaVA model skippable, in place.

    Args:
        model: Loaded model.
        router: What plans prompts at inference.
        adapter_width: Width of the skip adapters.
        adapter_init: "zero" (an untrained skip is the identity) or "xavier".
        skip_unit: What a skip leaves out: "layer", "attention" or "ffn".
    """
    attach(model, adapter_width, adapter_init, router, skip_unit)
    _remove_hooks(model)  # of an earlier attachment, if only the decoder was detached
    model.routing_hooks = [
        model.register_forward_pre_hook(_count_drafts, with_kwargs=True),
        model.model.register_forward_pre_hook(_describe_prompt, with_kwargs=True),
    ]
    return model


def detach_routing(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Undo ``attach_routing``, in place: the stock model without adapters, router and hooks.

    Raises:
        ValueError: If routing is not attached.
    """
    detach(model)
    _remove_hooks(model)
    return model


def refuse_skip_rate_if_dense(model: LlavaForConditionalGeneration, skip_rate: Tensor | float | None) -> None:
    """Raise ValueError if a skip rate is asked of a model without a router."""
    if skip_rate is not None and getattr(find_decoder(model), "router", None) is None:
        raise ValueError(f"Skip rate {skip_rate} was asked of a dense checkpoint; load one that a stage has routed.")


def set_skip_rate(model: LlavaForConditionalGeneration, skip_rate: float | None) -> None:
    """Ask for a mean skip rate from now on; None switches routing off, which gives the dense model bit for bit.

    One call or one row asks for another with ``skip_rate`` of ``forward`` and ``generate``, also while routing is off.

    Raises:
        ValueError: If routing is not attached, or its router was not calibrated for such a rate.
    """
    refuse_skip_rate_if_dense(model, skip_rate)
    router = getattr(find_decoder(model), "router", None)
    if router is None:
        return
    if skip_rate is not None:
        router.set_skip_rate(skip_rate)
    router.enabled = skip_rate is not None


def _remove_hooks(model: LlavaForConditionalGeneration) -> None:
    for hook in model.__dict__.pop("routing_hooks", ()):
        hook.remove()


def _count_drafts(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the whole model: tell the router which last positions of a prompt are drafts.

    Speculative decoding runs the prompt together with the first draft and asks for the logits of that draft only.
    """
    logits_to_keep = kwargs.get("logits_to_keep", 0)
    if not isinstance(logits_to_keep, int) or logits_to_keep < 2 or has_started(kwargs.get("past_key_values")):
        return None
    return args, {**kwargs, "num_drafted": logits_to_keep - 1}


def _describe_prompt(llava_model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook: at prefill, tell the router where image and question are, which only token ids know.

    Takes ``skip_rate`` and ``num_drafted`` out of the keywords.
    """
    if "skip_rate" not in kwargs and "num_drafted" not in kwargs and has_started(kwargs.get("past_key_values")):
        return None
    kwargs = dict(kwargs)
    skip_rate, num_drafted = kwargs.pop("skip_rate", None), kwargs.pop("num_drafted", 0)
    refuse_skip_rate_if_dense(llava_model, skip_rate)
    router, routing = getattr(find_decoder(llava_model), "router", None), kwargs.get("routing")  # None once detached
    if skip_rate is not None and (routing is not None or llava_model.training):
        found = "together with routing" if routing is not None else "in training"
        raise ValueError(
            f"skip_rate was given {found}, where the routing state alone says what is skipped; set its "
            "target_skip_ratio, or leave routing out and call eval()."
        )
    input_ids, attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    is_silent = skip_rate is None and (llava_model.training or not getattr(router, "enabled", False))
    if is_silent or routing is not None or has_started(kwargs.get("past_key_values")):
        return args, kwargs
    if input_ids is not None:
        state = RoutingState.from_batch(kwargs, llava_model.config.image_token_id, num_drafted=num_drafted)
    elif skip_rate is None:
        return args, kwargs
    else:
        embeddings = kwargs["inputs_embeds"]
        mask = torch.ones(embeddings.shape[:2], device=embeddings.device) if attention_mask is None else attention_mask
        state = RoutingState.from_batch({"attention_mask": mask})
    state.target_skip_ratio = skip_rate
    return args, {**kwargs, "routing": state}
