"""Promises of text-only batches: the vision tower runs, the result is that without it, gradients exist and are zero."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import attach
from fuzzyroe.routing_state import RoutingState
from llava.model.llava_llama import make_text_batches_safe

IDS = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 9, 8, 7, 2, 0]])
LABELS = torch.tensor([[-100, -100, 6, 7, 8, 2], [-100, -100, 8, 7, 2, -100]])
MASK = (torch.arange(6) < torch.tensor([[6], [5]])).long()
BATCH = {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK}


def count_tower_runs(model: LlavaForConditionalGeneration) -> list[int]:
    runs: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: runs.append(1))
    return runs


def test_a_text_only_training_batch_has_the_loss_of_the_stock_model(tiny_llava: LlavaForConditionalGeneration) -> None:
    tiny_llava.train()
    expected = tiny_llava(**BATCH)
    runs = count_tower_runs(tiny_llava)
    names = list(tiny_llava.state_dict())
    make_text_batches_safe(tiny_llava)
    found = tiny_llava(**BATCH)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    assert runs == [1] and list(tiny_llava.state_dict()) == names


def test_every_parameter_of_the_projector_has_a_gradient_of_zero(tiny_llava: LlavaForConditionalGeneration) -> None:
    tiny_llava.train()
    tiny_llava(**BATCH).loss.backward()
    expected = {name: p.grad.clone() for name, p in tiny_llava.named_parameters() if p.grad is not None}
    tiny_llava.zero_grad(set_to_none=True)
    make_text_batches_safe(tiny_llava)
    tiny_llava(**BATCH).loss.backward()
    projector = dict(tiny_llava.model.multi_modal_projector.named_parameters())
    assert projector
    for name, parameter in projector.items():
        assert parameter.grad is not None and not parameter.grad.any(), name
    for name, gradient in expected.items():
        assert torch.equal(tiny_llava.get_parameter(name).grad, gradient), name


def test_large_image_features_do_not_turn_the_loss_into_nan(tiny_llava: LlavaForConditionalGeneration) -> None:
    tiny_llava.train()
    expected = tiny_llava(**BATCH).loss
    make_text_batches_safe(tiny_llava)
    with torch.no_grad():  # each feature is finite, their sum is not: in float16 this happens from about 65,504 on
        tiny_llava.model.multi_modal_projector.linear_2.bias.fill_(2e38)
    assert torch.equal(tiny_llava(**BATCH).loss, expected)


def test_soft_routing_runs_the_tower_outside_training_too(tiny_llava: LlavaForConditionalGeneration) -> None:
    attach(tiny_llava, 4)
    make_text_batches_safe(tiny_llava)
    runs = count_tower_runs(tiny_llava)
    state = RoutingState.from_batch({"attention_mask": MASK}).forced(torch.ones(2, 4), mode="soft")
    tiny_llava(**BATCH, routing=state)
    assert runs == [1]
    tiny_llava(**BATCH, routing=RoutingState.from_batch({"attention_mask": MASK}).forced(torch.ones(2, 4)))
    assert runs == [1]


@pytest.mark.parametrize("is_training", [False, True])
def test_image_batches_and_inference_are_left_alone(
    tiny_llava: LlavaForConditionalGeneration, image_prompts: dict, is_training: bool
) -> None:
    tiny_llava.train(is_training)
    runs = count_tower_runs(tiny_llava)
    expected = tiny_llava(**image_prompts).logits
    make_text_batches_safe(tiny_llava)
    assert torch.equal(tiny_llava(**image_prompts).logits, expected)
    assert runs == [1, 1]
    tiny_llava.eval()(**BATCH)
    assert runs == [1, 1]
