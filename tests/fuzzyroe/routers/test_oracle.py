"""Promises of the search for the plan that hurts a known answer least."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fuzzyroe.attach import attach, find_decoder, set_router
from fuzzyroe.budget import allocate_skips
from fuzzyroe.routers import OracleRouter
from fuzzyroe.routers.oracle import answer_losses, losses_under, search_plans, search_rows
from fuzzyroe.routing_state import RoutingState
from labelled_batches import labelled


def best_of_all(loss_of, num_layers: int, candidates, count: int):
    """Brute force: the smallest loss over all sets of ``count`` layers, for each row."""
    losses = []
    for skipped in itertools.combinations(candidates, count):
        keep = torch.ones(4, num_layers, dtype=torch.bool)
        keep[:, list(skipped)] = False
        losses.append(loss_of(keep))
    return torch.stack(losses).amin(dim=0)


def test_answer_losses_are_means_over_the_answer_only():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 1], [-100, 4, -100, -100]])
    expected = [F.cross_entropy(logits[0, 1:3], labels[0, 2:]), F.cross_entropy(logits[1, :1], labels[1, 1:2])]
    torch.testing.assert_close(answer_losses(logits, labels), torch.stack(expected))
    with pytest.raises(ValueError, match=r"Rows \[1\] have no label"):
        answer_losses(logits, torch.tensor([[-100, 1, 1, 1], [2, -100, -100, -100]]))


@pytest.mark.parametrize("beam_width", [1, 2, 6])
def test_the_search_finds_what_its_width_allows(tiny_llama, padded_prompts, beam_width):
    attach(tiny_llama, 4, "xavier")
    batch, calls = labelled(padded_prompts), []

    def loss_of(keep):
        calls.append(keep)
        return losses_under(tiny_llama, batch, keep)

    plans, losses = search_rows(loss_of, 4, 4, 3, range(4), beam_width)
    assert plans.shape == (4, 4, 4) and (~plans).sum(dim=2).tolist() == [[0, 1, 2, 3]] * 4
    for count in range(4):
        torch.testing.assert_close(losses[:, count], loss_of(plans[:, count]), atol=1e-5, rtol=1e-5)
        if count < 2 or beam_width == 6:  # six sets of two layers: nothing is dropped
            torch.testing.assert_close(losses[:, count], best_of_all(loss_of, 4, range(4), count))
    if beam_width == 1:
        assert not (plans[:, 1:] & ~plans[:, :-1]).any(), "greedy plans are nested"


def test_layers_that_are_no_candidates_are_kept(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    known, plans, losses = search_plans(tiny_llama, [labelled(padded_prompts)] * 2, 3)
    assert known.shape == (8,) and losses.shape == (8, 4) and plans[:, :, 0].all() and len(set(known.tolist())) == 4
    with pytest.raises(ValueError, match="max_skips is 4, but 3 layers may be skipped"):
        search_plans(tiny_llama, [], 4)


def test_the_oracle_replays_its_plans_for_the_same_prompts_without_answers(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    batch = labelled(padded_prompts)
    router = OracleRouter.from_search(*search_plans(tiny_llama, [batch], 3))
    router.set_skip_rate(0.5)
    set_router(tiny_llama, router)
    asked = {name: value[:, :-2] for name, value in padded_prompts.items()}
    state = RoutingState.from_batch({"attention_mask": asked["attention_mask"]})
    with torch.no_grad():
        tiny_llama(**asked, routing=state)
        loss = losses_under(tiny_llama, batch, state.kept_layers()).sum()
        uniform = min(
            losses_under(tiny_llama, batch, keep).sum()
            for skipped in itertools.combinations(range(1, 4), 2)
            for keep in [torch.ones(4, 4).index_fill(1, torch.tensor(skipped), 0).bool()]
        )
    assert (~state.kept_layers()).sum() == 8 and loss < uniform
    strangers = {"input_ids": asked["input_ids"] + 1, "attention_mask": asked["attention_mask"]}
    with pytest.raises(ValueError, match="are nan; .*does not know these prompts"):
        tiny_llama(**strangers)
    assert find_decoder(tiny_llama).router is router


def test_a_budget_goes_where_it_costs_least():
    losses = np.array([[0.0, 1.0, 2.0, 3.0], [0.0, 0.1, 0.2, 5.0], [0.0, 3.0, 0.0, 0.0]])
    assert allocate_skips(losses, 0).tolist() == [0, 0, 0]
    assert allocate_skips(losses, 1).tolist() == [0, 0, 3], "a bad layer is stepped over"
    assert allocate_skips(losses, 5 / 3).tolist() == [0, 2, 3]
    assert allocate_skips(losses, 3).tolist() == [3, 3, 3]


@pytest.mark.parametrize("seed", range(5))
def test_allocated_budgets_are_met_and_no_worse_than_equal_shares(seed):
    losses = np.random.default_rng(seed).exponential(size=(30, 6)).cumsum(axis=1)
    for skips in (1, 2, 3):
        counts = allocate_skips(losses, skips)
        assert counts.sum() == 30 * skips
        assert losses[np.arange(30), counts].sum() <= losses[:, skips].sum() + 1e-9
