"""Promises of the skip adapter."""

import pytest
import torch

from fuzzyroe.adapter import SkipAdapter


def test_an_untrained_zero_adapter_gives_no_update_but_can_learn():
    adapter = SkipAdapter(8, 4)
    update = adapter(torch.randn(2, 3, 8))
    assert torch.equal(update, torch.zeros(2, 3, 8))
    update.sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0


def test_the_adapter_is_a_bias_free_bottleneck():
    adapter = SkipAdapter(8, 4, init="xavier")
    hidden_states = torch.randn(2, 3, 8)
    expected = torch.relu(hidden_states @ adapter.down.weight.T) @ adapter.up.weight.T
    assert torch.allclose(adapter(hidden_states), expected, atol=1e-6)
    assert sorted(adapter.state_dict()) == ["down.weight", "up.weight"]


def test_xavier_fills_both_projections_within_their_bound():
    adapter = SkipAdapter(8, 4, init="xavier")
    for weight in (adapter.down.weight, adapter.up.weight):
        assert 0 < weight.abs().max() <= (6 / (8 + 4)) ** 0.5


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="width=0"):
        SkipAdapter(8, 0)
    with pytest.raises(ValueError, match="known: zero, xavier"):
        SkipAdapter(8, 4, init="normal")
