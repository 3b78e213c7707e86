"""A routed tiny LLaVA and prompts for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from fuzzyroe import set_skip_rate
from fuzzyroe.budget import allocate
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from llava.conversation import get_template
from llava.data.preprocess import encode_prompt
from llava.model.llava_llama import attach_routing


def route(model: LlavaForConditionalGeneration, skip_unit: str = "layer") -> LlavaForConditionalGeneration:
    """Attach a fuzzy router whose scores spread over all percentiles of its plans; layer 0 is always kept."""
    router = FuzzyRouter(load_rule_base("default"), 4)
    router.feature_high.copy_(torch.tensor([0.9, 0.9, 0.6]))
    losses = np.random.default_rng(0).exponential(size=(80, 4)).cumsum(axis=1)
    losses *= np.linspace(1, 6, 80)[:, None]  # a higher score, a larger loss
    router.set_budget_table(allocate(losses, (np.arange(80) + 0.5) / 80, [2, 1, 3], 4))
    attach_routing(model, router, adapter_width=4, adapter_init="xavier", skip_unit=skip_unit)
    set_skip_rate(model, 0.4)
    return model


def encode_questions(tokenizer: Any, questions: list[str], image_token: int = 4) -> dict[str, torch.Tensor]:
    """Give left-padded prompts: ids, mask (B, N) and a random image of 32 px for each ``<image>``."""
    rows = []
    for question in questions:
        conversation = get_template("digits")
        conversation.append_message("USER", question)
        conversation.append_message("ASSISTANT", None)
        rows.append(encode_prompt(conversation, tokenizer, 16, image_token)[0])
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[3] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    num_images = sum(question.count("<image>") for question in questions)
    if num_images:
        generator = torch.Generator().manual_seed(2)
        inputs["pixel_values"] = torch.randn(num_images, 3, 32, 32, generator=generator)
    return inputs
