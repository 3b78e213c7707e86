"""Decoders of a given shape from random weights, routed, with dense copies of fewer layers beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fuzzyroe.attach import attach, detach, find_decoder
from fuzzyroe.flops import DecoderSizes
from fuzzyroe.routers import Router


@dataclass(frozen=True)
class Shape:
    """A decoder's shape.

    Attributes:
        name: What the table calls it.
        width, layers, heads, key_value_heads, mlp, vocabulary: As in the configuration.
        adapter: Width of the skip adapters, a quarter of the decoder's as in RoE.
    """

    name: str
    width: int
    layers: int
    heads: int
    key_value_heads: int
    mlp: int
    vocabulary: int

    @property
    def adapter(self) -> int:
        """Width of the skip adapters."""
        return self.width // 4

    @property
    def parameters(self) -> int:
        """Weights of decoder, embeddings, head and adapters; norms are left out."""
        key_value = self.width * self.key_value_heads // self.heads
        layer = self.width * (2 * self.width + 2 * key_value) + 3 * self.width * self.mlp
        return self.layers * (layer + 2 * self.width * self.adapter) + 2 * self.width * self.vocabulary

    @property
    def sizes(self) -> DecoderSizes:
        """What the count of operations needs."""
        return DecoderSizes(
            self.width, self.width * self.key_value_heads // self.heads, self.mlp, self.vocabulary, self.adapter
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


def build_routed(shape: Shape, router: Router, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """Build a routed decoder of random weights, in eval mode; its adapters are random too."""
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return attach(model, shape.adapter, "xavier", router).eval()


def shorten(model: nn.Module, num_layers: int, undo: Callable[[nn.Module], nn.Module] = detach) -> nn.Module:
    """Give a stock dense copy of a routed model with its first layers only; the weights are shared, not copied.

    Args:
        model: Routed model.
        num_layers: Layers to leave.
        undo: What takes the routing off the copy.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    short = undo(copy.deepcopy(model, shared))
    decoder = find_decoder(short)
    decoder.layers = decoder.layers[:num_layers]
    decoder.config.num_hidden_layers = num_layers
    return short
