"""Fixtures: a tiny checkpoint that answers, with a tokenizer of a few words and a router that a test can predict."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fuzzyroe.routing_state import RoutingState
from llava.conversation import get_template
from llava.inference.generator import Generator
from llava.model.builder import Checkpoint
from llava.model.llava_llama import LlavaLlamaForCausalLM, attach_routing

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = SPECIAL + ["USER", "ASSISTANT", ":", "?"] + [f"w{number}" for number in range(95 - len(SPECIAL) - 4)]


class LengthRouter(torch.nn.Module):
    """Skips layer l iff (length of the question + l) is a multiple of 3, so that rows differ."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.target_skip_ratio = 0.3

    def set_skip_rate(self, skip_rate: float) -> None:
        self.target_skip_ratio = skip_rate

    def plan(self, hidden_states: torch.Tensor, routing: RoutingState) -> None:
        lengths = routing.question_mask.sum(dim=1, keepdim=True)
        routing.result.keep_weights = ((lengths + torch.arange(4)) % 3 != 0).float().unsqueeze(1)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, 95 words; ``<s>`` is put in front."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pad, begin, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=begin, eos_token=end, unk_token=unknown
    )


@pytest.fixture
def checkpoint(tiny_llava: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    """A tiny dense checkpoint in memory."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = LlavaLlamaForCausalLM.adopt(tiny_llava, processor)  # as the loader does
    return Checkpoint(model, tokenizer, processor, "tiny", "tiny", None)


@pytest.fixture
def routed(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, routed by ``LengthRouter``."""
    attach_routing(checkpoint.model, LengthRouter(), adapter_width=4)
    return checkpoint


@pytest.fixture
def generator(routed: Checkpoint) -> Generator:
    """The routed checkpoint with the template that has no system prompt."""
    return Generator(routed, get_template("digits"))


@pytest.fixture
def images() -> list[Image.Image]:
    """Three images of one colour each."""
    return [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
