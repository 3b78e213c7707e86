"""Promises of nested plans: the mean of the thresholds is the skip rate, and more budget only adds skips."""

from __future__ import annotations

import numpy as np
import pytest

from fuzzyroe.budget import BudgetTable, allocate, greedy_layer_order, shrinkage
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base

NUM_LAYERS, MAX_SKIPS, NUM_BINS = 9, 4, 5
ORDER = [7, 2, 5, 3]
RULES = load_rule_base("default").interpolate()


def make_table(seed: int) -> BudgetTable:
    rng = np.random.default_rng(seed)
    losses = rng.normal(0.2, 0.5, (200, MAX_SKIPS + 1)).cumsum(axis=1)
    return allocate(losses, rng.permutation((np.arange(200) + 0.5) / 200), ORDER, NUM_LAYERS, NUM_BINS)


@pytest.fixture(params=range(5))
def table(request: pytest.FixtureRequest) -> BudgetTable:
    """A table from random losses, good and bad layers mixed."""
    return make_table(request.param)


def planner(table: BudgetTable) -> FuzzyRouter:
    """A router that plans with a table."""
    router = FuzzyRouter(RULES, table.thresholds.shape[1])
    router.set_budget_table(table)
    return router


def thresholds_at(table: BudgetTable, rate: float) -> np.ndarray:
    """Thresholds that a router takes from a table, (L,)."""
    router = planner(table)
    router.set_skip_rate(rate)
    return router.thresholds().double().numpy()


def skipped(table: BudgetTable, rate: float, percentiles: np.ndarray) -> np.ndarray:
    """Which layers examples skip, (n, L) bool."""
    return percentiles[:, None] < thresholds_at(table, rate)


def test_the_mean_of_the_thresholds_is_the_skip_rate(table: BudgetTable) -> None:
    np.testing.assert_allclose(table.thresholds.mean(axis=1), table.ratios, atol=1e-12)
    for rate in np.linspace(0, table.ratios[-1], 57):
        assert thresholds_at(table, rate).mean() == pytest.approx(rate, abs=1e-6)


def test_budgets_grow_one_bin_and_layer_at_a_time_from_nothing_to_all(table: BudgetTable) -> None:
    assert len(table.ratios) == NUM_BINS * MAX_SKIPS + 1
    np.testing.assert_allclose(np.diff(table.ratios), 1 / (NUM_BINS * NUM_LAYERS))
    assert not table.thresholds[0].any()
    assert table.ratios[-1] == pytest.approx(MAX_SKIPS / NUM_LAYERS)
    assert set(np.flatnonzero(table.thresholds[-1])) == set(ORDER)


def test_thresholds_never_fall_when_the_budget_grows(table: BudgetTable) -> None:
    assert (np.diff(table.thresholds, axis=0) >= 0).all()


def test_thresholds_fall_along_the_order_and_are_zero_elsewhere(table: BudgetTable) -> None:
    assert (np.diff(table.thresholds[:, ORDER], axis=1) <= 0).all()
    assert not np.delete(table.thresholds, ORDER, axis=1).any()


def test_a_higher_percentile_keeps_a_superset(table: BudgetTable) -> None:
    percentiles = np.linspace(0, 1, 101)
    for rate in np.linspace(0, table.ratios[-1], 23):
        skips = skipped(table, rate, percentiles)
        assert (skips[1:] <= skips[:-1]).all()


def test_the_requested_rate_is_met_on_held_out_percentiles(table: BudgetTable) -> None:
    percentiles = np.random.default_rng(99).uniform(size=20_000)
    for rate in np.linspace(0, table.ratios[-1], 19):
        assert skipped(table, rate, percentiles).mean() == pytest.approx(rate, abs=0.01)


def test_interpolation_is_exact_at_the_rows_and_linear_between(table: BudgetTable) -> None:
    for index, rate in enumerate(table.ratios):
        np.testing.assert_allclose(thresholds_at(table, rate), table.thresholds[index], atol=1e-6)
    middle = table.ratios[3:5].mean()
    np.testing.assert_allclose(thresholds_at(table, middle), table.thresholds[3:5].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("rate", [-0.01, 0.46, float("nan")])
def test_a_rate_outside_the_calibrated_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"outside the calibrated range \[0, 0.444\]"):
        planner(make_table(0)).set_skip_rate(rate)


@pytest.mark.parametrize(("skips", "layers"), [(7, 20), (7, 10), (3, 10), (9, 32)])
def test_the_largest_rate_survives_storage_in_single_precision(skips: int, layers: int) -> None:
    rates = np.float32([0, skips / layers]).astype(np.float64)
    table = BudgetTable(rates, np.array([[0.0], [skips / layers]]))
    assert thresholds_at(table, skips / layers)[0] == pytest.approx(skips / layers)


def test_the_easiest_bin_skips_first_where_all_bins_lose_alike() -> None:
    losses = np.tile([0.0, 1.0, 2.0], (8, 1))
    table = allocate(losses, (np.arange(8) + 0.5) / 8, [1, 0], 2, num_bins=4)
    np.testing.assert_allclose(table.thresholds[1], [0, 0.25])


def test_a_bin_that_loses_less_skips_more_within_the_nesting() -> None:
    slopes = np.repeat([0.1, 1.0, 0.2], 4)  # the middle bin loses most: the top one has to wait for it
    losses = slopes[:, None] * np.arange(3)
    table = allocate(losses, (np.arange(12) + 0.5) / 12, [1, 0], 2, num_bins=3)
    counts = (table.thresholds * 3).round().astype(int)  # bins that skip layer 0 and layer 1
    assert counts.tolist() == [[0, 0], [0, 1], [1, 1], [1, 2], [1, 3], [2, 3], [3, 3]]


def test_lookahead_steps_over_a_single_bad_layer() -> None:
    # For the lower bin the second layer of the order hurts and the third makes good: 0.1 per layer over both, while
    # the upper bin asks 0.3 at once. A greedy step by step search would turn to the upper bin first.
    losses = np.array([[0.0, 0.1, 1.0, 0.3], [0.0, 0.3, 0.6, 0.9]])
    table = allocate(losses, np.array([0.25, 0.75]), [0, 1, 2], 3, num_bins=2)
    assert table.thresholds[:4].tolist() == [[0, 0, 0], [0.5, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0.5]]


def test_percentile_one_belongs_to_the_last_bin() -> None:
    table = allocate(np.zeros((2, 2)), np.array([0.0, 1.0]), [0], 1, num_bins=2)
    assert table.thresholds.ravel().tolist() == [0, 0.5, 1]


def test_an_empty_bin_is_named() -> None:
    with pytest.raises(ValueError, match="Score bin 1 of 4 holds none of the 3 calibration examples"):
        allocate(np.zeros((3, 2)), np.array([0.1, 0.6, 0.9]), [0], 1, num_bins=4)


def test_the_layer_order_is_greedy_and_sees_interactions() -> None:
    single = {1: 0.5, 2: 0.2, 3: 0.3}

    def loss_of(layers: list[int]) -> float:
        return sum(single[layer] for layer in layers) + 10 * ({2, 3} <= set(layers))

    assert greedy_layer_order(loss_of, [1, 2, 3], 3) == [2, 1, 3]
    assert greedy_layer_order(loss_of, [1, 2, 3], 1) == [2]


def test_the_layer_order_ends_with_the_candidates() -> None:
    assert greedy_layer_order(lambda layers: 0.0, [4, 6], 5) == [4, 6]
    assert greedy_layer_order(lambda layers: 0.0, [], 2) == []


def test_bins_that_differ_by_chance_alone_are_not_believed() -> None:
    generator = np.random.default_rng(0)
    losses = generator.exponential(size=(400, 5)).cumsum(axis=1)
    bins = np.arange(400) % 8
    assert shrinkage(losses, bins) < 0.4
    hard = losses * (1 + bins[:, None])
    assert shrinkage(hard, bins) > 0.9
    assert shrinkage(losses[:8], bins[:8]) == 0.0  # one example each tells nothing


def test_scores_that_tell_nothing_give_every_example_nearly_the_same_depth() -> None:
    curve = 0.1 * np.arange(5) ** 2  # the deeper, the dearer
    losses = curve + np.random.default_rng(1).normal(scale=0.5, size=(64, 1)) * np.linspace(0, 1, 5)
    shuffled = np.random.default_rng(2).permutation(64)
    table = allocate(losses, (shuffled + 0.5) / 64, [1, 2, 3, 4], 5)
    assert shrinkage(losses, np.minimum(shuffled // 8, 7)) == 0.0
    for rate in np.linspace(0, 0.8, 17):
        depths = np.unique([(np.linspace(0.01, 0.99, 50)[:, None] < thresholds_at(table, rate)).sum(axis=1)])
        assert np.ptp(depths) <= 1
