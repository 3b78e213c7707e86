"""Attachment of routing to a LLaVA model."""

from __future__ import annotations

from typing import Any

from fuzzyroe.attach import attach
from llava.model.llava_llama import LlavaLlamaForCausalLM


def attach_routing(
    model: Any, router: Any, adapter_width: int, adapter_init: str = "zero", skip_unit: str = "layer"
) -> LlavaLlamaForCausalLM:
    """Make the decoder layers of a LLaVA model skippable, in place; ``fuzzyroe.detach`` undoes it.

    A model of transformers' own class becomes a ``LlavaLlamaForCausalLM``, whose forward tells the router where images
    and questions are; only token ids know.

    Args:
        model: Loaded model.
        router: What plans prompts at inference.
        adapter_width: Width of the skip adapters.
        adapter_init: "zero" (an untrained skip is the identity) or "xavier".
        skip_unit: What a skip leaves out: "layer", "attention" or "ffn".

    Returns:
        The same model.

    Raises:
        ValueError, TypeError, KeyError: As ``fuzzyroe.attach``.
    """
    if not isinstance(model, LlavaLlamaForCausalLM):
        model = LlavaLlamaForCausalLM.adopt(model)
    attach(model, adapter_width, adapter_init, router, skip_unit)
    return model
