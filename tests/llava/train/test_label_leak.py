"""No answer steers a route: another token anywhere in an answer changes nothing of its own turn or of earlier ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import find_decoder
from fuzzyroe.budget import BudgetTable
from fuzzyroe.routers import FuzzyRouter, LinearRouter
from fuzzyroe.routers.roe.tokens import RoEPass
from fuzzyroe.routers.roe.training import relax
from fuzzyroe.routing_state import RoutingResult, RoutingState
from fuzzyroe.rules import load_rule_base
from llava.constants import IGNORE_INDEX
from llava.data.dataset import SFTCollator
from llava.model.llava_llama import attach_routing

IMAGE, OTHER = 4, 97


@pytest.fixture
def batch(sft_dataset) -> dict[str, Tensor]:
    """All records: four with an image, two of text, one to three turns."""
    return SFTCollator(pad_token_id=3)(list(sft_dataset))


def calibrated() -> FuzzyRouter:
    """A fuzzy router whose plans depend on what it sees."""
    router = FuzzyRouter(load_rule_base("default"), 4)
    router.feature_high.fill_(0.9)
    rates = torch.linspace(0, 0.75, 4).double().numpy()
    router.set_budget_table(BudgetTable(rates, rates[:, None] * [0, 4 / 3, 4 / 3, 4 / 3]))
    return router


def route(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> RoutingResult:
    """Run a batch as training does; what was decided."""
    state = RoutingState.from_batch(batch, IMAGE, "soft")
    if isinstance(find_decoder(model).router, LinearRouter):
        state.roe = RoEPass(relax(0.6, 0.3, None))
    else:
        state.target_skip_ratio = 0.5
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("turn_ids", "labels")}
    model(**inputs, routing=state)
    return state.result


def changed_at(batch: dict[str, Tensor], row: int, position: int) -> dict[str, Tensor]:
    """The batch with another token at one position of an answer."""
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][row, position] = other["labels"][row, position] = OTHER
    return other


@torch.no_grad()
def test_no_token_of_an_answer_changes_a_feature_or_a_plan_up_to_its_turn(
    reading_llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    model = attach_routing(reading_llava, calibrated(), 8, "xavier").train()
    expected = route(model, batch)
    assert 0 < expected.keep_weights.mean() < 1 and expected.keep_weights.unique().numel() > 1
    learned = (batch["labels"] != IGNORE_INDEX).nonzero().tolist()
    assert len(learned) > 30 and {row for row, _ in learned} == set(range(6))
    for row, position in learned:
        found = route(model, changed_at(batch, row, position))
        for name in ("features", "scores", "keep_weights"):  # not even later turns: each is planned by its question
            assert torch.equal(getattr(found, name), getattr(expected, name)), (name, row, position)


@pytest.mark.parametrize("summary", ["tokens", "pooled"])
@torch.no_grad()
def test_no_token_of_the_last_answer_changes_a_route_of_linear_routers(
    summary: str, reading_llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    """An earlier answer may: later questions see it, and RoE mixes the prefix by the mean over the turns."""
    torch.manual_seed(0)
    router = LinearRouter(4, reading_llava.config.text_config.hidden_size, summary)
    model = attach_routing(reading_llava, router, 8, "xavier").train()
    expected = route(model, batch).keep_weights
    assert expected.std() > 0.01
    last = batch["turn_ids"] == batch["turn_ids"].amax(dim=1, keepdim=True)
    for row, position in ((batch["labels"] != IGNORE_INDEX) & last).nonzero().tolist():
        assert torch.equal(route(model, changed_at(batch, row, position)).keep_weights, expected), (row, position)


@torch.no_grad()
def test_a_token_of_a_question_does_change_a_route(
    reading_llava: LlavaForConditionalGeneration, batch: dict[str, Tensor]
) -> None:
    model = attach_routing(reading_llava, calibrated(), 8).train()
    expected = route(model, batch).features
    row, turn_ids = 1, batch["turn_ids"][1]
    questions = ((turn_ids == 1) & (batch["labels"][row] == IGNORE_INDEX)).nonzero().flatten().tolist()
    found = route(model, changed_at(batch, row, questions[2])).features
    assert not torch.equal(found[row, 0], expected[row, 0])
