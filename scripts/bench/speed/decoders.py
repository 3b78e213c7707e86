"""Decoders of random weights in three forms: dense, routed by given plans, and shortened to the ideal of a plan."""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fuzzyroe.attach import attach, detach, find_decoder, find_decoder_layers, set_router
from fuzzyroe.cache import RoutedCacheLayer
from fuzzyroe.flops import DecoderSizes
from fuzzyroe.routers import Router
from fuzzyroe.routing_state import RoutingState, RowSplit
from scripts.bench.bench import Clock

NUM_LEVELS = 8
NUM_IMAGE_TOKENS, IMAGE_SIZE = 576, 336


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, as in its configuration."""

    name: str
    width: int
    layers: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int

    @property
    def sizes(self) -> DecoderSizes:
        """What the count of operations needs; skip adapters are a quarter as wide as the decoder, as in RoE."""
        key_value = self.width * self.key_value_heads // self.heads
        return DecoderSizes(self.width, key_value, self.mlp, self.vocabulary, self.width // 4)

    @property
    def parameters(self) -> int:
        """Weights of decoder, embeddings, head and adapters; norms are left out."""
        layer = self.width * (2 * self.width + 2 * self.width * self.key_value_heads // self.heads + 3 * self.mlp)
        return self.layers * (layer + 2 * self.width * (self.width // 4)) + 2 * self.width * self.vocabulary

    def config(self) -> LlamaConfig:
        """The configuration."""
        return LlamaConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.mlp,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            attn_implementation="sdpa",
            pad_token_id=0,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        # vocabularies of the first two keep the head's share of a layer as it is at 7B
        Shape("quick", 512, 8, 8, 8, 1408, 4000),
        Shape("bar", 1024, 16, 16, 16, 2816, 8000),
        Shape("1b", 2048, 16, 32, 8, 8192, 32000),
        Shape("7b", 4096, 32, 32, 32, 11008, 32000),
        Shape("13b", 5120, 40, 40, 40, 13824, 32000),
    )
}
"""Shapes by name; 1b is that of Llama 3.2 1B, 7b and 13b are those of LLaVA-1.5."""


def spread_skips(num_layers: int, skip_rate: float, count: int = NUM_LEVELS) -> list[int]:
    """Skipped layers of ``count`` requests, at even distances around the mean, which is a whole number.

    They go from none to twice the mean, or as far up as the first layer can stay; of one request, the mean.
    """
    mean = round(skip_rate * num_layers)
    if count == 1:
        return [mean]
    low = max(0, 2 * mean - (num_layers - 1))
    return [round(level) for level in np.linspace(low, 2 * mean - low, count)]


def nested_plans(num_layers: int, skips: Sequence[int]) -> Tensor:
    """Plans that skip the first layers of one order, which leaves the first layer to the end, (n, L) bool."""
    order = [*range(1, num_layers, 2), *range(2, num_layers, 2), 0]
    positions = torch.empty(num_layers, dtype=torch.long)
    positions[order] = torch.arange(num_layers)
    return positions >= torch.tensor(skips).unsqueeze(1)


class Replayed(Router):
    """Asks another router as ever, then plans what it is told: the policy's cost with plans that are the bench's.

    The caller sets ``plans``, keep weights (B, L), for each batch; ``calls`` counts how often it was asked.
    """

    def __init__(self, router: Router, num_layers: int) -> None:
        super().__init__()
        self.router, self.layers = router, getattr(router, "layers", nn.ModuleList())
        self.decides_layer_wise, self.num_layers = router.decides_layer_wise, num_layers
        self.plans, self.calls = torch.ones(1, num_layers), 0

    @property
    def skip_rate(self) -> float:
        """That of the plans."""
        return 1 - float(self.plans.mean())

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Let the policy plan, and replace what it planned."""
        self.calls += 1
        self.router.plan(hidden_states, routing)
        if not self.decides_layer_wise:
            routing.result.keep_weights = self.plans.unsqueeze(1)

    def prepare(self, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState) -> dict[str, Any]:
        """Let the policy prepare the pass."""
        return self.router.prepare(decoder, inputs, routing)

    def decide(self, layer: int, hidden_states: Tensor, routing: RoutingState) -> Tensor:
        """Let the policy decide, and replace what it decided."""
        self.calls += 1
        self.router.decide(layer, hidden_states, routing)
        return self.plans[:, layer : layer + 1]


@dataclass(frozen=True)
class Form:
    """A model to run, with the plans of a batch: True where the row runs the layer, (B, L); None for a dense one."""

    model: nn.Module
    plans: Tensor | None = None


class Bench:
    """A routed decoder of random weights, and its dense copies; routed prefills bear the cost of a policy."""

    def __init__(self, shape: Shape, policy: Router, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.shape, self.device, self.dtype, self.clock = shape, device, dtype, Clock(device)
        self.router = Replayed(policy, shape.layers)
        with torch.device(device):
            model = LlamaForCausalLM._from_config(shape.config(), dtype=dtype)
        self.routed = attach(model, shape.width // 4, "xavier", self.router).eval()
        self.dense = functools.cache(functools.partial(shorten, self.routed))

    def set_policy(self, policy: Router) -> None:
        """Bear the cost of another router from now on."""
        self.router = Replayed(policy, self.shape.layers)
        set_router(self.routed, self.router)

    def ideal(self, num_skipped: int) -> Form:
        """The dense model with layers removed."""
        return Form(self.dense(self.shape.layers - num_skipped))

    def whole(self) -> Form:
        """The dense model."""
        return self.ideal(0)

    def planned(self, plans: Tensor) -> Form:
        """The routed model with plans, (B, L)."""
        return Form(self.routed, plans)

    def skipping(self, *skips: int) -> Form:
        """The routed model with nested plans that skip so many layers, a row each."""
        return self.planned(nested_plans(self.shape.layers, skips))

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

    def prefills(self, forms: dict[Any, Form], batch: int, length: int) -> dict[Any, Callable[[], DynamicCache]]:
        """A prefill of each form, to be timed in turns."""
        return {name: functools.partial(self.prefill, form, batch, length) for name, form in forms.items()}

    def decodes(self, forms: dict[Any, Form], batch: int, length: int, steps: int) -> dict[Any, Callable[[], None]]:
        """Decoding steps of each form from a filled cache of its own, to be timed in turns."""
        caches = {name: self.filled(form, batch, length) for name, form in forms.items()}
        return {name: functools.partial(self.decode, form, caches[name], batch, steps) for name, form in forms.items()}

    @torch.inference_mode()
    def adapter_seconds(self, batch: int, length: int) -> float:
        """Median of what one skipped layer takes for a whole batch: norm, adapter, residual; mean over the layers."""
        states = torch.randn(batch, length, self.shape.width, device=self.device, dtype=self.dtype)
        layers = list(find_decoder_layers(self.routed)) * (5 if length == 1 else 1)
        passes = [self.clock.seconds(lambda: [layer.skip_output(states) for layer in layers]) for _ in range(5)]
        return statistics.median(passes) / len(layers)


def shorten(model: nn.Module, num_layers: int) -> nn.Module:
    """Give a stock dense copy of a routed model with its first layers only; the weights are shared, not copied."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    short = detach(copy.deepcopy(model, shared))
    decoder = find_decoder(short)
    decoder.layers = decoder.layers[:num_layers]
    decoder.config.num_hidden_layers = num_layers
    return short


def prompt_state(batch: int, length: int, device: str) -> RoutingState:
    """The state of prompts with an image of 576 positions, or of a quarter of a short prompt, and its pixels."""
    positions = torch.arange(length, device=device).expand(batch, -1)
    image = positions < (NUM_IMAGE_TOKENS if length > NUM_IMAGE_TOKENS else length // 4)
    pixels = random_pixels().to(device).expand(batch, -1, -1, -1)
    return RoutingState(1 - image.long(), image, ~image, "hard", num_turns=1, pixel_values=pixels)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that a cache stores."""
    stored = [layer for layer in cache.layers if layer.keys is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)


@functools.cache
def random_pixels() -> Tensor:
    """Pixels of one image, (1, 3, H, W)."""
    return torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@functools.cache
def _ids(batch: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
