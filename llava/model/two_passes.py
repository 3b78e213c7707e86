"""The two models behind one prompt: all layers, or those that a plan keeps, over the same weights and cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicLayer

from fuzzyroe.attach import find_decoder_layers
from fuzzyroe.cache import RoutedCacheLayer
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.row_split import RowSplit
from llava.model.routing import prompt_routing


@dataclass
class ObservedRouting(RoutingState):
    """A state whose router decides as ever, while every row runs every layer."""

    def split(self, layer: int) -> RowSplit:
        """Give the decision to run the layer."""
        return RowSplit(torch.ones(self.turn_ids.shape[0], dtype=torch.bool))


class TwoPasses:
    """Passes of the full and of the drafting model behind one prefilled prompt.

    Args:
        model: The routed model.
        prompt_length: Positions N of the prompt.
        keep: Layers that the draft runs, (L,) bool on the CPU.
        model_kwargs: What ``generate`` prepared: the filled cache, and mask and position ids of the prompt, (1, N).
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, prompt_length: int, keep: Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        self.model, self.keep = model, keep
        self.cache: Cache = model_kwargs["past_key_values"]
        self.prompt_mask: Tensor | None = model_kwargs.get("attention_mask")
        positions = model_kwargs.get("position_ids")
        # padding in front takes indices, but no positions
        self.padding = 0 if positions is None else prompt_length - 1 - positions[:, -1:]  # (1, 1)
        self.stores_keys = [layer.skip_unit.stores_keys for layer in find_decoder_layers(model)]

    def verify(self, tokens: Tensor) -> Tensor:
        """Run all layers over tokens, (1, n), that follow the cache; give their logits, (1, n, vocabulary)."""
        return self._run(tokens, self.cache)

    def draft_with(self, cache: Cache, tokens: Tensor) -> Tensor:
        """Run the kept layers over tokens, (1, n), that follow a forked cache; logits (1, n, vocabulary)."""
        return self._run(tokens, cache)

    def fork_cache(self) -> Cache:
        """Give the cache as the draft sees it: kept layers go on from the full model's keys and values.

        The tensors are borrowed, and appending makes new ones, so the verified cache is never written. That the draft
        reads states of the full model, not of its own layers, changes what it proposes and nothing else.
        """
        length = self.cache.get_seq_length()
        forked = []
        for index, layer in enumerate(self.cache.layers):
            is_kept, stores_keys = bool(self.keep[index]), self.stores_keys[index]
            fork = DynamicLayer() if is_kept else RoutedCacheLayer(RowSplit(self.keep[index : index + 1]), stores_keys)
            if is_kept or stores_keys:
                fork.lazy_initialization(layer.keys, layer.values)
                fork.keys, fork.values = layer.keys, layer.values
            if not is_kept:
                fork.seen = length
            forked.append(fork)
        return Cache(layers=forked)

    def forget_beyond(self, length: int) -> None:
        """Cut the cache back to its first ``length`` positions."""
        surplus = self.cache.get_seq_length() - length
        if surplus > 0:
            self.cache.crop(-surplus)

    def _run(self, tokens: Tensor, cache: Cache) -> Tensor:
        start, stop = cache.get_seq_length(), cache.get_seq_length() + tokens.shape[1]
        positions = torch.arange(start, stop, device=tokens.device).unsqueeze(0) - self.padding
        mask = self.prompt_mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(1, stop - mask.shape[1])], dim=1)
        output = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.logits


def prefill_and_plan(
    model: LlavaForConditionalGeneration, input_ids: Tensor, model_kwargs: dict[str, Any], skip_rate: float | None
) -> tuple[Tensor, Tensor]:
    """Run the full model over the prompt while the router plans on it; give logits and kept layers, (L,) bool."""
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    mask, pixel_values = inputs.get("attention_mask"), inputs.get("pixel_values")
    prompt = prompt_routing(input_ids, mask, model.config.image_token_id, pixel_values)
    routing = ObservedRouting(**{field.name: getattr(prompt, field.name) for field in fields(prompt) if field.init})
    routing.skip_rate = skip_rate
    logits = model(**inputs, routing=routing).logits
    return logits, routing.decisions()[0]
