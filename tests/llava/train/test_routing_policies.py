"""Promises of the routing state of a training batch: answers steer nothing, budgets are drawn per sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuzzyroe.budget import BudgetTable
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import load_rule_base
from llava.constants import IGNORE_INDEX as M
from llava.data.dataset import SFTCollator
from llava.train.routing_policies import BudgetedRouting, RandomRouting

IMAGE = 4


@pytest.fixture
def batch(sft_dataset) -> dict[str, Tensor]:
    """All records: four with an image, two of text, one to three turns."""
    return SFTCollator(pad_token_id=3)(list(sft_dataset))


@pytest.fixture
def router() -> FuzzyRouter:
    router = FuzzyRouter(load_rule_base("default"), 4)
    router.feature_high.fill_(0.9)
    rates = torch.linspace(0, 0.75, 4).double().numpy()
    router.set_budget_table(BudgetTable(rates, rates[:, None] * [0, 4 / 3, 4 / 3, 4 / 3]))
    return router


def test_a_literal_batch_is_described() -> None:
    inputs = {
        "input_ids": torch.tensor([[1, 5, 4, 4, 8, 6, 9, 2, 8, 9], [1, 5, 8, 6, 9, 2, 3, 3, 3, 3]]),
        "labels": torch.tensor([[M] * 6 + [9, 2, M, 9], [M] * 4 + [9, 2] + [M] * 4]),
        "turn_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1, -1, -1, -1, -1]]),
    }
    state = RoutingState.from_batch(inputs, IMAGE, "soft")
    assert state.mode == "soft" and state.num_turns == 2 and state.result.keep_weights is None
    assert torch.equal(state.turn_ids, inputs["turn_ids"])
    assert state.image_mask.int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 10]
    assert state.question_mask.int().tolist() == [[0, 0, 0, 0, 1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]


def test_without_an_image_the_system_prompt_belongs_to_the_first_question() -> None:
    inputs = {
        "input_ids": torch.tensor([[1, 7, 7, 8, 9], [1, 7, 4, 8, 9]]),
        "labels": torch.tensor([[M, M, M, M, 9], [M, M, M, M, 9]]),
        "turn_ids": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]),
    }
    state = RoutingState.from_batch(inputs, IMAGE, "soft")
    assert state.turn_ids.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert state.question_mask.int().tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert inputs["turn_ids"][0, 0] == 0, "the batch itself is left as it is"


def test_other_answers_change_no_feature_and_no_route(batch: dict[str, Tensor], router: FuzzyRouter) -> None:
    embeddings = torch.nn.Embedding(200, 16).requires_grad_(False)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    learned = batch["labels"] != M
    other["input_ids"][learned] = other["labels"][learned] = 150
    plans = []
    for inputs in (batch, other):
        state = RoutingState.from_batch(inputs, IMAGE, "soft")
        state.target_skip_ratio = 0.5
        router.plan(embeddings(inputs["input_ids"]), state)
        plans.append(state)
    assert not torch.equal(embeddings(batch["input_ids"]), embeddings(other["input_ids"]))
    for name in ("features", "scores", "keep_weights"):
        assert torch.equal(getattr(plans[0].result, name), getattr(plans[1].result, name)), name
    assert 0 < plans[0].result.keep_weights.mean() < 1


def test_budgets_are_uniform_up_to_the_largest(batch: dict[str, Tensor]) -> None:
    routing = BudgetedRouting(IMAGE, max_skip_ratio=0.4)
    budgets = torch.stack([routing(batch).target_skip_ratio for _ in range(300)])
    assert budgets.shape == (300, 6)
    assert 0 <= budgets.min() and 0.39 < budgets.max() <= 0.4
    assert budgets.mean() == pytest.approx(0.2, abs=0.01)
    assert (budgets.std(dim=1) > 0).all(), "samples of one batch have budgets of their own"


def test_a_share_of_the_samples_skips_nothing(batch: dict[str, Tensor]) -> None:
    for ratio in (0.0, 0.3, 1.0):
        routing = BudgetedRouting(IMAGE, 0.5, dense_ratio=ratio)
        dense = torch.stack([routing(batch).target_skip_ratio == 0 for _ in range(300)])
        assert dense.float().mean() == pytest.approx(ratio, abs=0.04)


def test_budgets_follow_torchs_generator_which_a_resumed_run_restores(batch: dict[str, Tensor]) -> None:
    routing = BudgetedRouting(IMAGE, 0.5, dense_ratio=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = routing(batch).target_skip_ratio
        saved = torch.get_rng_state()
        second = routing(batch).target_skip_ratio
        torch.set_rng_state(saved)
        assert torch.equal(routing(batch).target_skip_ratio, second) and not torch.equal(first, second)


def test_budgets_that_were_drawn_are_planned(batch: dict[str, Tensor], router: FuzzyRouter) -> None:
    state = BudgetedRouting(IMAGE, 0.75, dense_ratio=0.5)(batch)
    state.target_skip_ratio[:] = torch.tensor([0.0, 0.75, 0.0, 0.75, 0.75, 0.0])
    router.score_quantiles.add_(0.999)  # every score has a percentile near 0
    router.plan(torch.nn.Embedding(200, 16)(batch["input_ids"]), state)
    kept = state.result.keep_weights.mean(dim=(1, 2))
    assert kept.tolist() == pytest.approx([1, 0.25, 1, 0.25, 0.25, 1])


def test_random_skips_reach_the_rate_keep_the_first_layer_and_need_no_router(batch: dict[str, Tensor]) -> None:
    routing = RandomRouting(IMAGE, num_layers=8, max_skip_ratio=0.5)
    torch.manual_seed(0)
    drawn = torch.cat([routing(batch).keep_weights.flatten(0, 1) for _ in range(300)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn[:, 0].min() == 1.0
    assert 1 - drawn[:, 1:].mean().item() == pytest.approx(0.25, abs=0.01)


def test_random_skips_repeat_with_the_seed(batch: dict[str, Tensor]) -> None:
    routing = RandomRouting(IMAGE, num_layers=8, max_skip_ratio=0.5)
    torch.manual_seed(1)
    first = routing(batch).keep_weights
    torch.manual_seed(1)
    assert torch.equal(first, routing(batch).keep_weights)
