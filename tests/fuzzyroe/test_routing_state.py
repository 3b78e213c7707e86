"""Promises of the routing state."""

import pytest
import torch

from fuzzyroe.routing_state import RoutingState, RowSplit


def make_state(turn_ids, keep_weights=None, mode="soft"):
    turn_ids = torch.tensor(turn_ids)
    return RoutingState(turn_ids, torch.zeros_like(turn_ids).bool(), turn_ids > 0, mode, keep_weights)


def test_positions_get_the_weight_of_their_turn():
    # two examples, three turns, two layers; the second example has one turn only
    weights = torch.tensor([[[0.1, 0.2], [0.3, 0.4], [0.5, 0.9]], [[0.7, 0.6], [0.0, 0.0], [0.0, 0.0]]])
    state = make_state([[0, 1, 2, 3, 3], [-1, -1, 0, 1, 1]], weights)
    expected = torch.tensor([[0.5, 0.2, 0.4, 0.9, 0.9], [1.0, 1.0, 0.6, 0.6, 0.6]])
    assert torch.allclose(state.position_weights(1), expected)


def test_an_example_without_turns_is_kept():
    state = make_state([[-1, 0, 0], [0, 1, 1]], torch.zeros(2, 1, 3))
    assert torch.equal(state.position_weights(0), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    assert state.kept_layers().tolist() == [[True] * 3, [False] * 3]
    assert state.mean_skip_rate() == 1.0


def test_position_weights_carry_gradient_to_every_used_turn():
    weights = torch.full((1, 2, 1), 0.5, requires_grad=True)
    make_state([[0, 1, 1, 2]], weights).position_weights(0).sum().backward()
    assert torch.allclose(weights.grad.flatten(), torch.tensor([2.5, 1.5]))  # half of turn 0 each


def test_the_last_turn_decides_at_one_half():
    weights = torch.tensor([[[0.9, 0.9], [0.5, 0.49]], [[0.2, 0.8], [0.9, 0.9]]])
    state = make_state([[0, 1, 2], [-1, 0, 1]], weights, mode="hard")
    assert state.kept_layers().tolist() == [[True, False], [False, True]]
    assert state.kept_layers() is state.kept_layers()
    assert state.split(0).keep.tolist() == [True, False]


def test_skip_rate_ignores_turns_an_example_does_not_have():
    weights = torch.tensor([[[0.5, 0.7], [0.9, 0.9]], [[0.2, 0.2], [0.0, 0.0]]])
    state = make_state([[0, 1, 2], [-1, 0, 1]], weights)
    assert state.mean_skip_rate().item() == pytest.approx(((1 - 0.75) + 0.8) / 2)
    assert state.turn_mask().tolist() == [[True, True], [True, False]]


def test_a_batch_of_prompts_marks_padding_image_and_question():
    attention_mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    input_ids = torch.tensor([[0, 9, 5, 5], [5, 5, 9, 5]])
    state = RoutingState.from_batch({"input_ids": input_ids, "attention_mask": attention_mask}, image_token_id=9)
    assert state.turn_ids.tolist() == [[-1, 0, 1, 1], [0, 0, 0, 1]]
    assert state.question_mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert state.mode == "hard" and state.result.keep_weights is None


def test_forced_decisions_are_those_given():
    keep = torch.tensor([[True, False], [False, True]])
    assert torch.equal(RoutingState.from_batch({"attention_mask": torch.ones(2, 3)}).forced(keep).kept_layers(), keep)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="Unknown routing mode 'firm'"):
        make_state([[1]], mode="firm")
    with pytest.raises(ValueError, match="image_mask has shape"):
        RoutingState(torch.ones(1, 2), torch.ones(1, 3), torch.ones(1, 2), "soft")
    with pytest.raises(ValueError, match="no keep_weights"):
        make_state([[1]]).kept_layers()
    with pytest.raises(ValueError, match=r"allowed is \(B, T, L\)"):
        make_state([[1]], torch.ones(2, 1, 1)).position_weights(0)
    with pytest.raises(ValueError, match="names turn 2"):
        make_state([[1, 2]], torch.ones(1, 1, 1)).position_weights(0)
    with pytest.raises(ValueError, match="names turn 2"):
        make_state([[1, 2]], torch.ones(1, 1, 1)).kept_layers()
    with pytest.raises(ValueError, match="Layer 3 asked"):
        make_state([[1]], torch.ones(1, 1, 2)).split(3)
    with pytest.raises(ValueError, match="2D mask"):
        RoutingState.from_batch({"attention_mask": torch.ones(1, 1, 2, 2)})


@pytest.mark.parametrize(
    ("keep", "all_kept", "none_kept"), [([1, 1], True, False), ([0, 0], False, True), ([0, 1, 1], False, False)]
)
def test_flags_count_the_kept_rows(keep, all_kept, none_kept):
    split = RowSplit(torch.tensor(keep, dtype=torch.bool))
    assert (split.num_rows, split.num_kept) == (len(keep), sum(keep))
    assert (split.all_kept, split.none_kept) == (all_kept, none_kept)


def test_row_indices_are_made_once_per_device():
    split = RowSplit(torch.tensor([False, True, True, False]))
    kept, skipped = split.rows(torch.device("cpu"))
    assert kept.tolist() == [1, 2] and skipped.tolist() == [0, 3]
    assert split.rows(torch.device("cpu"))[0] is kept
