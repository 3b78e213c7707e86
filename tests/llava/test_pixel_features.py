"""Features of the pixels are the same in calibration, training and inference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import find_decoder
from fuzzyroe.features import code_length, edge_share
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import load_rule_base
from llava.constants import IGNORE_INDEX
from llava.model.llava_llama import attach_routing

NAMES = ("edge_density", "coding_cost", "question_length")


@pytest.fixture
def model(tiny_llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A tiny LLaVA routed by features of the pixels."""
    base = load_rule_base("default")
    variables = tuple(replace(variable, name=name) for variable, name in zip(base.antecedents, NAMES, strict=True))
    router = FuzzyRouter(replace(base, antecedents=variables), len(find_decoder(tiny_llava).layers))
    return attach_routing(tiny_llava, router, adapter_width=4)


@torch.no_grad()
def planned_features(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], **options) -> Tensor:
    """The features that the router saw, (B, T, K)."""
    seen: list[RoutingState] = []
    hook = find_decoder(model).register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["routing"]), with_kwargs=True
    )
    try:
        model(**inputs, **options)
    finally:
        hook.remove()
    return seen[0].result.features


def test_prompts_and_training_batches_see_the_same_pixels(model, image_prompts: dict[str, Tensor]) -> None:
    pixels = image_prompts["pixel_values"]
    pixels[1] *= 0.1  # a plainer image
    features = planned_features(model, image_prompts)
    torch.testing.assert_close(features[:, 0, 0], edge_share(pixels))
    torch.testing.assert_close(features[:, 0, 1], code_length(pixels))
    assert (features[0, 0, :2] > features[1, 0, :2]).all()

    is_image = image_prompts["input_ids"] == model.config.image_token_id
    after_image = is_image.flip(1).cumsum(1).flip(1) == 0
    turn_ids = (after_image.long() - (image_prompts["attention_mask"] == 0).long()).clamp(min=-1)
    batch = {**image_prompts, "labels": torch.full_like(turn_ids, IGNORE_INDEX), "turn_ids": turn_ids}
    state = RoutingState.from_batch(batch, model.config.image_token_id, "soft")
    torch.testing.assert_close(planned_features(model, image_prompts, routing=state), features)


def test_a_prompt_without_an_image_beside_one_with_an_image_has_no_detail(model, image_prompts) -> None:
    inputs = {key: value.clone() for key, value in image_prompts.items()}
    inputs["input_ids"][0] = inputs["input_ids"][0].clamp(max=50)  # the first row is text only
    inputs["pixel_values"] = inputs["pixel_values"][1:]
    features = planned_features(model, inputs)
    assert features[0, 0, :2].tolist() == [0, 0]
    torch.testing.assert_close(features[1, 0, 0], edge_share(inputs["pixel_values"])[0])
