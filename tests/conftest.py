"""Tiny random models, built from configs, that every test may use."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fuzzyroe.routing_state import RoutingState

VOCAB_SIZE = 96
IMAGE_TOKEN_ID = 95
PAD_TOKEN_ID = 0

# weights of this spread make layers matter, so that a wrong decision shows in the logits
TEXT_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": PAD_TOKEN_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def build_llama() -> LlamaForCausalLM:
    """A 4-layer Llama of width 32."""
    return LlamaForCausalLM(LlamaConfig(**TEXT_SIZES))


def build_qwen2() -> Qwen2ForCausalLM:
    """A 4-layer Qwen2 of width 32."""
    return Qwen2ForCausalLM(Qwen2Config(**TEXT_SIZES))


def build_llava() -> LlavaForConditionalGeneration:
    """A LLaVA over the tiny Llama; a 32 px image with patches of 8 px gives 16 image tokens."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT_SIZES),
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


BUILDERS = {"llama": build_llama, "qwen2": build_qwen2, "llava": build_llava}


def build_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model in eval mode, with the same weights for the same seed.

    Args:
        name: A key of ``BUILDERS``.
        seed: Seed of the random weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILDERS[name]().eval()
    model.generation_config.pad_token_id = PAD_TOKEN_ID
    model.generation_config.eos_token_id = None
    return model


class FixedRouter(torch.nn.Module):
    """A router whose decisions are given, to be repeated over the beams of each example.

    Args:
        keep: True where the example runs the layer, (B, L) bool.
    """

    def __init__(self, keep: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep.float())
        self.enabled = True
        self.calls: list[torch.Size] = []

    def plan(self, hidden_states: torch.Tensor, routing: RoutingState) -> None:
        self.calls.append(hidden_states.shape)
        beams = hidden_states.shape[0] // self.keep.shape[0]
        routing.result.keep_weights = self.keep.repeat_interleave(beams, dim=0).unsqueeze(1)


@pytest.fixture
def fixed_router() -> type[FixedRouter]:
    """The class of a router whose decisions are given."""
    return FixedRouter


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A fresh tiny Llama in eval mode."""
    return build_model("llama")


@pytest.fixture
def tiny_llava() -> LlavaForConditionalGeneration:
    """A fresh tiny LLaVA in eval mode."""
    return build_model("llava")


@pytest.fixture(params=["llama", "qwen2"])
def tiny_decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A fresh tiny language model in eval mode, of each family in turn."""
    return build_model(request.param)


@pytest.fixture
def padded_prompts() -> dict[str, torch.Tensor]:
    """Four left-padded prompts of 5, 9, 7 and 8 tokens: ``input_ids`` and ``attention_mask``, (4, 9)."""
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(3, IMAGE_TOKEN_ID, (4, 9), generator=generator)
    lengths = torch.tensor([5, 9, 7, 8])
    attention_mask = (torch.arange(9) >= 9 - lengths.unsqueeze(1)).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


@pytest.fixture
def image_prompts() -> dict[str, torch.Tensor]:
    """Two left-padded prompts with one image each: ``input_ids``, ``attention_mask``, (2, 22), and ``pixel_values``."""
    generator = torch.Generator().manual_seed(8)
    input_ids = torch.randint(3, IMAGE_TOKEN_ID, (2, 22), generator=generator)
    input_ids[:, 3:19] = IMAGE_TOKEN_ID
    attention_mask = torch.ones(2, 22, dtype=torch.long)
    attention_mask[0, :2] = 0
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator)
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask, "pixel_values": pixel_values}
