"""Promises of the number that tells prompts apart."""

from __future__ import annotations

import pytest
import torch

from fuzzyroe.prompt_hash import prompt_hashes, uniforms
from fuzzyroe.routing_state import RoutingState

EMBEDDINGS = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))


def prompt(question, image_at=0, num_image=3, padding=0, pixels=None, dtype=torch.float32):
    """States and routing of one prompt: padding, an image of ``num_image`` positions, a question."""
    states = torch.zeros(1, padding + num_image + len(question), 12)
    states[0, padding : padding + num_image] = torch.randn(num_image, 12) if image_at else 1.0
    states[0, padding + num_image :] = EMBEDDINGS[question]
    mask = (torch.arange(states.shape[1]) >= padding).long().unsqueeze(0)
    image = (torch.arange(states.shape[1]) >= padding) & (torch.arange(states.shape[1]) < padding + num_image)
    routing = RoutingState.from_batch(
        {"input_ids": image.long().unsqueeze(0), "attention_mask": mask}, image_token_id=1
    )
    routing.pixel_values = pixels
    return states.to(dtype), routing


def number(*args, **kwargs):
    return int(prompt_hashes(*prompt(*args, **kwargs)))


def test_padding_and_states_of_the_image_do_not_count():
    expected = number([4, 7, 9])
    assert number([4, 7, 9], padding=5) == number([4, 7, 9], image_at=1, num_image=2) == expected


@pytest.mark.parametrize("other", [[4, 9, 7], [4, 7], [4, 7, 9, 9], [4, 7, 8], [7, 9]])
def test_another_question_has_another_number(other):
    assert number(other) != number([4, 7, 9])


def test_pixels_count_and_only_those_of_the_row():
    first, second = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    alone = [number([4, 7], pixels=first), number([4, 7], pixels=second), number([4, 7], num_image=0)]
    states = torch.cat([prompt([4, 7])[0], prompt([4, 7])[0], prompt([4, 7], num_image=0, padding=3)[0]])
    image = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0] * 5]).bool()
    mask = torch.tensor([[1] * 5, [1] * 5, [0, 0, 0, 1, 1]])
    routing = RoutingState.from_batch({"input_ids": image.long(), "attention_mask": mask}, image_token_id=1)
    routing.pixel_values = torch.cat([first, second])
    assert prompt_hashes(states, routing).flatten().tolist() == alone and len(set(alone)) == 3


def test_turns_have_numbers_of_their_own():
    states = EMBEDDINGS[[1, 2, 3, 1, 2]].unsqueeze(0)
    turn_ids = torch.tensor([[1, 1, 0, 2, 2]])
    found = prompt_hashes(states, RoutingState(turn_ids, turn_ids < 0, turn_ids > 0, "hard"))
    assert found.shape == (1, 2) and found[0, 0] == found[0, 1], "the same question, asked twice"
    turn_ids = torch.tensor([[1, 1, 0, 2, 0]])
    found = prompt_hashes(states, RoutingState(turn_ids, turn_ids < 0, turn_ids > 0, "hard"))
    assert found[0, 0] != found[0, 1]


def test_draws_are_uniform_independent_and_set_by_the_seed():
    numbers = torch.arange(4000).unsqueeze(1)  # the hardest case: neighbours
    draws = uniforms(numbers, 8, seed=0)
    assert draws.shape == (4000, 1, 8) and draws.min() >= 0 and draws.max() < 1
    flat = draws[:, 0]
    assert (flat.mean(dim=0) - 0.5).abs().max() < 0.02 and (flat.std(dim=0) - 12**-0.5).abs().max() < 0.01
    correlations = torch.corrcoef(flat.T) - torch.eye(8)
    assert correlations.abs().max() < 0.06
    assert torch.equal(uniforms(numbers, 8, 0), draws) and not torch.equal(uniforms(numbers, 8, 1), draws)
