"""Promises of the two ways to put both branches together, on literal numbers."""

from __future__ import annotations

import pytest
import torch

from fuzzyroe.routed_layer import mix
from fuzzyroe.routing_state import RoutingState, RowSplit

STATES = torch.arange(12.0).view(3, 2, 2)


def double(states, *args, **kwargs):
    return 2 * states


def negate(states):
    return -states


def test_rows_go_through_one_branch_each():
    mixed = mix(RowSplit(torch.tensor([True, False, True])), double, negate, STATES, (), {})
    assert torch.equal(mixed, torch.stack([2 * STATES[0], -STATES[1], 2 * STATES[2]]))


def test_where_all_rows_skip_nothing_is_run():
    def refuse(states):
        raise AssertionError

    assert torch.equal(mix(RowSplit(torch.zeros(3).bool()), refuse, negate, STATES, (), {}), -STATES)


def test_the_run_gets_the_rows_of_its_arguments():
    seen = {}

    def run(states, mask, **kwargs):
        seen.update(kwargs, states=states, mask=mask)
        return states

    mask, flag = torch.arange(3.0).view(3, 1), torch.tensor([1, 2, 3])
    kwargs = {"position_ids": torch.zeros(1, 2), "flag": flag, "cache": None}
    mix(RowSplit(torch.tensor([False, True, True])), run, negate, STATES, (mask,), kwargs)
    assert torch.equal(seen["states"], STATES[1:]) and seen["mask"].tolist() == [[1], [2]]
    assert seen["position_ids"] is kwargs["position_ids"] and seen["flag"] is flag and seen["cache"] is None


def test_positions_blend_by_the_weight_of_their_turn():
    turn_ids = torch.tensor([[0, 1], [1, 2], [-1, 1]])
    weights = torch.tensor([[0.25, 0.0], [0.5, 1.0], [0.0, 0.0]]).view(3, 2, 1)
    routing = RoutingState(turn_ids, turn_ids < -1, turn_ids > 0, "soft", weights)
    keep = torch.tensor([[0.25, 0.25], [0.5, 1.0], [1.0, 0.0]]).unsqueeze(-1)
    mixed = mix(routing.position_weights(0), double, negate, STATES, (), {})
    torch.testing.assert_close(mixed, keep * 2 * STATES + (1 - keep) * -STATES)


def test_a_run_that_gives_more_than_a_tensor_is_refused():
    split = RowSplit(torch.tensor([True, False, True]))
    with pytest.raises(TypeError, match="gave a tuple; routed layers need"):
        mix(split, lambda states: (states, None), negate, STATES, (), {})
