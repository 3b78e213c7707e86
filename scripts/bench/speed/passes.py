"""Prefill and decoding of a decoder in three forms: dense, routed by given plans, and shortened to the ideal."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fuzzyroe.attach import find_decoder_layers, set_router
from fuzzyroe.cache import RoutedCacheLayer
from fuzzyroe.routers import Router
from fuzzyroe.routing_state import RoutingState, RowSplit
from scripts.bench.speed.plans import Replayed
from scripts.bench.speed.shapes import Shape, build_routed, shorten
from scripts.bench.speed.timing import Clock

NUM_IMAGE_TOKENS, IMAGE_SIZE = 576, 336


@dataclass(frozen=True)
class Form:
    """One form of the decoder with the plans of a batch.

    Attributes:
        model: The model to run.
        plans: True where the row runs the layer, (B, L) bool; None for a dense one.
    """

    model: nn.Module
    plans: Tensor | None = None


class Bench:
    """A routed decoder of random weights, and its dense copies.

    Args:
        shape: Shape of the decoder.
        policy: The router whose cost routed prefills bear.
        dtype: Of the weights.
        device: "cpu" or a CUDA device.
    """

    def __init__(self, shape: Shape, policy: Router, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.shape, self.device, self.dtype, self.clock = shape, device, dtype, Clock(device)
        self.router = Replayed(policy, shape.layers)
        self.routed = build_routed(shape, self.router, dtype, device)
        self.dense = functools.cache(functools.partial(shorten, self.routed))

    def set_policy(self, policy: Router) -> None:
        """Bear the cost of another router from now on."""
        self.router = Replayed(policy, self.shape.layers)
        set_router(self.routed, self.router)

    def whole(self) -> Form:
        """The dense model."""
        return Form(self.dense(self.shape.layers))

    def ideal(self, num_skipped: int) -> Form:
        """The dense model with layers removed."""
        return Form(self.dense(self.shape.layers - num_skipped))

    def planned(self, plans: Tensor) -> Form:
        """The routed model with plans, (B, L)."""
        return Form(self.routed, plans)

    @torch.inference_mode()
    def prefill(self, form: Form, batch: int, length: int) -> DynamicCache:
        """Read prompts that are alike in everything but their plans; a router sees images in front of the question."""
        cache = DynamicCache(config=form.model.config)
        inputs: dict[str, Any] = {"input_ids": _ids(batch, length, self.shape.vocabulary).to(self.device)}
        if form.plans is not None:
            self.router.plans = form.plans.float().to(self.device)
            inputs["routing"] = prompt_state(batch, length, self.device)
        form.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def filled(self, form: Form, batch: int, length: int) -> DynamicCache:
        """A cache of random keys and values, as a prefill of that form leaves it."""
        config, cache = form.model.config, DynamicCache(config=form.model.config)
        splits: dict[tuple[bool, ...], RowSplit] = {}
        size = (config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        for index in range(config.num_hidden_layers):
            num_kept = batch
            if form.plans is not None and not form.plans[:, index].all():
                keep = form.plans[:, index]
                split = splits.setdefault(tuple(keep.tolist()), RowSplit(keep))
                cache.layers[index], num_kept = RoutedCacheLayer(split), split.num_kept
            if num_kept:
                keys = torch.randn(num_kept, *size, device=self.device, dtype=self.dtype)
                cache.layers[index].update(keys, keys.flip(0))
            else:
                cache.layers[index].advance(length)
        return cache

    @torch.inference_mode()
    def decode(self, form: Form, cache: DynamicCache, batch: int, steps: int) -> None:
        """Decode and forget again, so that every call starts from the same cache."""
        token = torch.full((batch, 1), 5, device=self.device)
        for _ in range(steps):
            form.model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-steps)

    @torch.inference_mode()
    def adapter_seconds(self, batch: int, length: int, repeats: int = 1) -> float:
        """What one skipped layer takes for a whole batch: norm, adapter, residual; mean over the layers."""
        states = torch.randn(batch, length, self.shape.width, device=self.device, dtype=self.dtype)
        layers = list(find_decoder_layers(self.routed)) * repeats
        return self.clock.seconds(lambda: [layer.skip_output(states) for layer in layers]) / len(layers)


def prompt_state(batch: int, length: int, device: str) -> RoutingState:
    """The state of prompts with an image of 576 positions, or of a quarter of a short prompt, and its pixels."""
    positions = torch.arange(length, device=device).expand(batch, -1)
    image = positions < (NUM_IMAGE_TOKENS if length > NUM_IMAGE_TOKENS else length // 4)
    pixels = _pixels(batch).to(device)
    return RoutingState(1 - image.long(), image, ~image, "hard", num_turns=1, pixel_values=pixels)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that a cache stores."""
    stored = [layer for layer in cache.layers if layer.keys is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)


@functools.cache
def _ids(batch: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


@functools.cache
def _pixels(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).expand(batch, -1, -1, -1)
