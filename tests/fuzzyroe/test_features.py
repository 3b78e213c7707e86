"""Promises of the task-complexity features: range, what they read, what they must not read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fuzzyroe.features import (
    CODING_STEP,
    EDGE_STEP,
    FEATURES,
    FULL_CONTRAST,
    MAX_QUESTION_LENGTH,
    code_length,
    compute_features,
    edge_share,
    mean_over_images,
    summarise,
)
from fuzzyroe.routing_state import RoutingState

NAMES = tuple(FEATURES)
STATISTICS = (edge_share, code_length)
TEXT_ONLY_NAMES = ("text_entropy", "text_dispersion", "question_length")

# one row per example: s system, i image, digit = question of that turn, a answer, . padding
ROWS = ("siii11a22a", "siii111a..", "s11a2222a.")


def make_state(rows: tuple[str, ...] = ROWS, num_turns: int | None = None) -> RoutingState:
    """Read a drawn batch; answers belong to the turn of the question before them."""
    turns, image, question = [], [], []
    for row in rows:
        turn, ids = 0, []
        for sign in row:
            turn = int(sign) if sign.isdigit() else turn
            ids.append({".": -1, "s": 0, "i": 0}.get(sign, turn))
        turns.append(ids)
        image.append([sign == "i" for sign in row])
        question.append([sign.isdigit() for sign in row])
    return RoutingState(torch.tensor(turns), torch.tensor(image), torch.tensor(question), "soft", num_turns=num_turns)


def features_of(states: Tensor, rows: tuple[str, ...] = ROWS, num_turns: int | None = None) -> Tensor:
    return compute_features(summarise(states, make_state(rows), num_turns), NAMES)


@pytest.fixture
def states() -> Tensor:
    return torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FEATURES)
def test_features_lie_in_the_unit_interval(name: str, states: Tensor) -> None:
    constant = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(3)).expand(3, 10, 16)
    for case in (states, 100 * states, 1e-6 * states, torch.zeros(3, 10, 16), torch.ones(3, 10, 16), constant):
        values = FEATURES[name](summarise(case, make_state()))
        assert values.shape == (3, 2) and values.dtype == torch.float32
        assert values.min() >= 0 and values.max() <= 1


def test_rounding_cannot_push_a_feature_out_of_the_unit_interval() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):  # equal states everywhere: cosine, norm and entropy sit on their bounds
        state = torch.randn(1, 1, 7, generator=generator).expand(1, 10, 7)
        values = features_of(state, ROWS[:1])
        assert values.min() >= 0 and values.max() <= 1


def test_features_of_a_sample_ignore_its_neighbours(states: Tensor) -> None:
    expected = features_of(states)
    others = states.clone()
    others[1:] = 1e4
    assert torch.equal(features_of(others)[0], expected[0])
    for index, row in enumerate(ROWS):
        alone = features_of(states[index : index + 1], (row,), num_turns=2)
        torch.testing.assert_close(alone[0], expected[index], atol=1e-6, rtol=0)


def test_features_ignore_padding_answers_and_the_system_prompt(states: Tensor) -> None:
    other = states.clone()
    state = make_state()
    other[~(state.image_mask | state.question_mask)] = 1e4
    assert torch.equal(features_of(other), features_of(states))


def test_more_padding_changes_no_feature(states: Tensor) -> None:
    padded = torch.cat([states, torch.randn(3, 5, 16)], dim=1)
    right = features_of(padded, tuple(row + "....." for row in ROWS))
    left = features_of(padded.roll(5, dims=1), tuple("....." + row for row in ROWS))
    torch.testing.assert_close(right, features_of(states), atol=1e-6, rtol=0)
    torch.testing.assert_close(left, features_of(states), atol=1e-6, rtol=0)


def test_a_turn_ignores_the_words_of_other_turns(states: Tensor) -> None:
    other = states.clone()
    other[make_state().turn_ids == 2] = 5.0
    assert torch.equal(features_of(other)[:, 0], features_of(states)[:, 0])
    assert not torch.equal(features_of(other)[0, 1], features_of(states)[0, 1])


def test_without_an_image_features_are_defined_and_those_of_the_image_are_zero(states: Tensor) -> None:
    values = dict(zip(NAMES, features_of(states)[2].unbind(-1), strict=True))
    assert all(torch.isfinite(value).all() for value in values.values())
    for name in set(NAMES) - set(TEXT_ONLY_NAMES):
        assert values[name].tolist() == [0, 0]
    assert all(values[name].min() > 0 for name in TEXT_ONLY_NAMES)


def test_a_turn_that_an_example_lacks_is_finite(states: Tensor) -> None:
    assert torch.isfinite(features_of(states)[1, 1]).all()
    assert torch.isfinite(features_of(states, ("..........",) * 3)).all()


def test_one_turn_asked_for_is_the_first_of_one_turn_batches(states: Tensor) -> None:
    rows = ("siii11aaaa", "siii111a..", "s11aaaa...")
    assert torch.equal(features_of(states, rows, num_turns=1), features_of(states, rows))


def test_features_follow_their_formulas() -> None:
    states = torch.zeros(1, 10, 4)
    states[0, 1:4] = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 2.0, 0]])
    states[0, 4:6] = torch.tensor([3.0, 3.0, 3.0, 0])
    values = dict(zip(NAMES, features_of(states, ("siii11aaaa",))[0, 0].tolist(), strict=True))
    probabilities = torch.tensor([2 / 3, 2 / 3, 2 / 3, 0]).softmax(0)
    assert values["image_entropy"] == pytest.approx(-(probabilities * probabilities.log()).sum().item() / math.log(4))
    probabilities = torch.tensor([3.0, 3, 3, 0]).softmax(0)
    assert values["text_entropy"] == pytest.approx(-(probabilities * probabilities.log()).sum().item() / math.log(4))
    assert values["cross_modal_similarity"] == pytest.approx(1)
    assert values["image_dispersion"] == pytest.approx(1 - 1 / math.sqrt(3))
    assert values["text_dispersion"] == pytest.approx(0, abs=1e-6)
    assert values["question_length"] == pytest.approx(math.log(3) / math.log(513))


def test_opposite_image_and_question_have_similarity_zero() -> None:
    states = torch.ones(1, 10, 4)
    states[0, 4:6] = -1
    assert features_of(states, ("siii11aaaa",))[0, 0, NAMES.index("cross_modal_similarity")] == pytest.approx(0)


def test_question_length_ends_at_one() -> None:
    for length, expected in ((MAX_QUESTION_LENGTH, 1.0), (MAX_QUESTION_LENGTH + 90, 1.0)):
        value = features_of(torch.ones(1, length, 4), ("1" * length,))[0, 0, NAMES.index("question_length")]
        assert value == pytest.approx(expected)


def test_half_precision_states_are_pooled_in_float32(states: Tensor) -> None:
    rounded = states.bfloat16()
    assert torch.equal(features_of(rounded), features_of(rounded.float()))


def test_columns_come_in_the_order_of_the_names(states: Tensor) -> None:
    summary = summarise(states, make_state())
    backwards = compute_features(summary, NAMES[::-1])
    assert torch.equal(backwards.flip(-1), compute_features(summary, list(NAMES)))


def test_an_unknown_feature_is_named_with_the_known_ones(states: Tensor) -> None:
    with pytest.raises(KeyError, match="Feature 'brightness' is unknown.*image_entropy"):
        compute_features(summarise(states, make_state()), ("brightness",))


def test_image_statistics_are_means_over_the_images_of_a_row(states: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 8, 8, generator=generator) * torch.tensor([0.01, 0.1, 1.0]).view(3, 1, 1, 1)
    rows = ("siiii11aaa", "s11aaaaaaa", "sii11aaaaa")  # two images, none, one
    state = make_state(rows)
    state.pixel_values = pixels
    names = ("edge_density", "coding_cost")
    values = compute_features(summarise(states, state), names)  # (B, T, 2)
    for column, statistic in enumerate(STATISTICS):
        alone = statistic(pixels)
        assert 0 < alone[0] < alone[1] < alone[2] <= 1
        expected = torch.stack([alone[:2].mean(), torch.zeros(()), alone[2]])
        torch.testing.assert_close(values[:, 0, column], expected)


def test_without_pixels_image_statistics_are_zero(states: Tensor) -> None:
    assert not compute_features(summarise(states, make_state()), ("edge_density", "coding_cost")).any()


def test_pixels_are_looked_at_only_where_a_feature_asks_for_them(states: Tensor) -> None:
    state = make_state()
    state.pixel_values = torch.zeros(2, 3, 8, 8, device="meta")  # any use of its values would fail
    names = tuple(name for name in NAMES if name not in ("edge_density", "coding_cost"))
    compute_features(summarise(states, state), names)


def half_and_half(step: float) -> Tensor:
    """One 5 x 5 image: three columns at 0, two columns at ``step``."""
    return torch.tensor([0.0, 0, 0, step, step]).expand(1, 3, 5, 5)


def test_an_edge_counts_whole_from_its_step_on_and_in_proportion_below() -> None:
    for step, share in ((EDGE_STEP, 1.0), (10 * EDGE_STEP, 1.0), (-EDGE_STEP / 4, 0.25)):
        assert edge_share(half_and_half(step)).item() == pytest.approx(share / 4)  # 1 of 4 columns of gradients


def test_a_difference_costs_its_code() -> None:
    expected = math.log1p(0.7 / CODING_STEP) / math.log1p(FULL_CONTRAST / CODING_STEP) / 4
    assert code_length(half_and_half(0.7)).item() == pytest.approx(expected)
    checkerboard = torch.tensor([0, FULL_CONTRAST] * 4).expand(1, 3, 8, 8)
    assert code_length(checkerboard).item() == pytest.approx(1)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_plain_images_have_none_and_busier_ones_more(statistic) -> None:
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)
    values = [statistic(image).item() for image in (torch.full((1, 3, 32, 32), 0.8), smooth, noise, 100 * noise)]
    assert values[0] == 0 and values == sorted(values) and 1 >= values[3] > values[2] > values[1] > 0


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_pixel_shows_in_its_image_only(statistic, bad: float) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = statistic(images)
    images[1, 0, 4, 4] = bad
    values = statistic(images)
    assert not torch.isfinite(values[1]) and torch.equal(values[[0, 2]], expected[[0, 2]])
    means = mean_over_images(values, torch.tensor([4, 4, 4]))
    assert torch.equal(torch.isfinite(means), torch.tensor([True, False, True]))


def test_half_precision_pixels_change_little() -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for statistic in STATISTICS:
        rounded = statistic(images.bfloat16())
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, statistic(images), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([9, 9], [1.0, 2.0]),
        ([0, 18, 0], [0.0, 1.5, 0.0]),
        ([18, 9, 0, 9], [1.5, 3.0, 0.0, 4.0]),
        ([576 * 4], [2.5]),
    ],
)
def test_images_belong_to_rows_in_order(tokens: list[int], expected: list[float]) -> None:
    number = {2: 2, 3: 2, 4: 4, 1: 4}[len(tokens)]
    means = mean_over_images(torch.arange(1.0, number + 1), torch.tensor(tokens, dtype=torch.float32))
    assert means.tolist() == expected


def test_rows_without_any_image_have_zero() -> None:
    assert mean_over_images(torch.ones(1), torch.zeros(3)).tolist() == [0, 0, 0]
