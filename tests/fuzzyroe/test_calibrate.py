"""Promises of fitting a fuzzy router, on synthetic examples whose loss increase is planted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fuzzyroe.calibrate import (
    TARGET_RANGE,
    Measurements,
    feature_range,
    rank_correlation,
    scale,
    skip_loss_increase,
)
from fuzzyroe.features import FEATURES
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import FuzzyRuleBase, load_rule_base

NAMES = tuple(FEATURES)
NUM_LAYERS, ORDER = 12, [5, 9, 3, 7, 8, 2]
USED = ("image_dispersion", "text_dispersion", "question_length")


def draw_features(count: int, seed: int) -> np.ndarray:
    """Raw features in narrow ranges of their own, as real ones are, (n, K)."""
    return 0.4 + 0.2 * np.random.default_rng(seed).uniform(size=(count, len(NAMES)))


def plant(features: np.ndarray, signs: dict[str, float], noise: float = 0.1, seed: int = 7) -> np.ndarray:
    """Losses by number of skipped layers, (n, 7), growing with the named features."""
    rng = np.random.default_rng(seed)
    difficulty = sum(sign * 5 * (features[:, NAMES.index(name)] - 0.5) for name, sign in signs.items())  # in +-1.5
    increase = np.exp(difficulty)[:, None] * np.linspace(0, 1, len(ORDER) + 1) ** 2
    return 0.5 + increase + noise * rng.normal(size=increase.shape)


def measure(signs: dict[str, float], count: int = 400, **options: float) -> Measurements:
    features = draw_features(count, 0)
    return Measurements(NAMES, features, plant(features, signs, **options), ORDER, draw_features(4096, 1))


def scores_of(router: FuzzyRouter, raw: np.ndarray) -> torch.Tensor:
    columns = [NAMES.index(name) for name in router.antecedents]
    return router.rules(router.scale(torch.as_tensor(raw[:, columns], dtype=torch.float32)))


@pytest.fixture(scope="module")
def rule_base() -> FuzzyRuleBase:
    return load_rule_base("default")


@pytest.fixture(scope="module")
def calibrated(rule_base: FuzzyRuleBase) -> tuple[FuzzyRouter, dict]:
    return FuzzyRouter(rule_base, NUM_LAYERS).calibrate(measure(dict.fromkeys(USED, 1.0)), 0.3)


def test_the_score_follows_planted_loss_increases_on_held_out_examples(calibrated: tuple[FuzzyRouter, dict]) -> None:
    router, report = calibrated
    held_out = draw_features(2000, 2)
    planted = skip_loss_increase(plant(held_out, dict.fromkeys(USED, 1.0), noise=0.0))
    assert rank_correlation(scores_of(router, held_out).numpy(), planted) > 0.95
    assert report["score_correlation"] > max(report["feature_correlation"].values()) > 0.3


def test_the_requested_skip_rate_is_met_on_held_out_examples(calibrated: tuple[FuzzyRouter, dict]) -> None:
    router, _ = calibrated
    scores = scores_of(router, draw_features(20_000, 3)).unsqueeze(1)
    for rate in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        assert 1 - router.keep_weights(scores, rate).mean() == pytest.approx(rate, abs=0.01)
    assert 1 - router.keep_weights(scores).mean() == pytest.approx(0.3, abs=0.01)


def test_hard_examples_keep_more_layers_and_lose_less_than_a_shuffled_plan(
    calibrated: tuple[FuzzyRouter, dict],
) -> None:
    router, _ = calibrated
    held_out = draw_features(4000, 4)
    losses = plant(held_out, dict.fromkeys(USED, 1.0), noise=0.0)
    skips = (1 - router.keep_weights(scores_of(router, held_out).unsqueeze(1), 0.25)).sum(dim=-1).long().squeeze(1)
    planned = losses[np.arange(4000), skips.numpy()].mean()
    shuffled = losses[np.random.default_rng(0).permutation(4000), skips.numpy()].mean()
    assert planned < shuffled - 0.05


def test_a_decreasing_feature_is_flipped(rule_base: FuzzyRuleBase) -> None:
    signs = {"image_dispersion": 1.0, "text_dispersion": -1.0, "question_length": 1.0}
    router, report = FuzzyRouter(rule_base, NUM_LAYERS).calibrate(measure(signs), 0.3)
    assert report["flipped_features"] == ["text_dispersion"]
    assert router.rule_base.signs.tolist() == [1, -1, 1]
    low, high = np.full((1, len(NAMES)), 0.5), np.full((1, len(NAMES)), 0.5)
    column = NAMES.index("text_dispersion")
    low[0, column], high[0, column] = 0.42, 0.58
    assert scores_of(router, high) < scores_of(router, low) - 0.1


def test_calibrating_again_flips_nothing_back(rule_base: FuzzyRuleBase) -> None:
    measured = measure({"image_dispersion": 1.0, "text_dispersion": -1.0, "question_length": 1.0})
    first, _ = FuzzyRouter(rule_base, NUM_LAYERS).calibrate(measured, 0.3)
    second, _ = FuzzyRouter(first.rule_base, NUM_LAYERS).calibrate(measured, 0.3)
    assert second.rule_base.signs.tolist() == [1, -1, 1]
    np.testing.assert_allclose(second.rule_base.table, first.rule_base.table, atol=1e-9)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, atol=1e-6, rtol=0)


def test_a_feature_that_says_nothing_is_not_flipped(rule_base: FuzzyRuleBase) -> None:
    turned = rule_base.interpolate().flip_direction([1, 1, -1])  # question length declared as decreasing
    measured = measure({"image_dispersion": 1.0, "text_dispersion": 1.0})
    for array in (measured.features, measured.score_features):
        array[:, NAMES.index("question_length")] = 0.5
    router, report = FuzzyRouter(turned, NUM_LAYERS).calibrate(measured, 0.3)
    assert report["feature_correlation"]["question_length"] == 0
    assert report["flipped_features"] == [] and router.rule_base.signs.tolist() == [1, 1, -1]


def test_a_feature_of_undeclared_direction_keeps_its_rules(rule_base: FuzzyRuleBase) -> None:
    variables = tuple(
        replace(variable, monotone=None if variable.name == "text_dispersion" else variable.monotone)
        for variable in rule_base.antecedents
    )
    undeclared = replace(rule_base.interpolate(), antecedents=variables)
    measured = measure({"image_dispersion": 1.0, "text_dispersion": -1.0, "question_length": 1.0})
    first, report = FuzzyRouter(undeclared, NUM_LAYERS).calibrate(measured, 0.3)
    second, _ = FuzzyRouter(first.rule_base, NUM_LAYERS).calibrate(measured, 0.3)
    assert report["flipped_features"] == []
    np.testing.assert_array_equal(second.rule_base.prior_table, first.rule_base.prior_table)


def test_calibration_gives_the_same_router_each_time(
    calibrated: tuple[FuzzyRouter, dict], rule_base: FuzzyRuleBase
) -> None:
    again, report = FuzzyRouter(rule_base, NUM_LAYERS).calibrate(measure(dict.fromkeys(USED, 1.0)), 0.3)
    assert report == calibrated[1]
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in calibrated[0].state_dict().items())


def test_layers_outside_the_order_are_never_skipped(calibrated: tuple[FuzzyRouter, dict]) -> None:
    outside = sorted(set(range(NUM_LAYERS)) - set(ORDER))
    assert not calibrated[0].budget_thresholds[:, outside].any()


def test_the_report_is_plain_and_complete(calibrated: tuple[FuzzyRouter, dict]) -> None:
    router, report = calibrated
    assert (report["examples"], report["score_examples"], report["target_skip_ratio"]) == (400, 4096, 0.3)
    assert set(report["feature_correlation"]) == set(USED)
    assert report["layer_order"] == ORDER and len(report["mean_loss_by_skips"]) == len(ORDER) + 1
    assert np.mean(report["thresholds"]) == pytest.approx(0.3, abs=1e-6)
    assert len(report["rules"]) == router.rule_base.num_rules == 27


@pytest.mark.parametrize(
    ("options", "message"), [({"target_skip_ratio": 0.6}, "range"), ({"num_bins": 401}, "Score bin")]
)
def test_what_cannot_be_met_is_refused(rule_base: FuzzyRuleBase, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router = FuzzyRouter(rule_base, NUM_LAYERS)
        router.calibrate(measure({"image_dispersion": 1.0}), **({"target_skip_ratio": 0.3} | options))


def test_non_finite_measurements_are_refused(rule_base: FuzzyRuleBase) -> None:
    measured = measure({"image_dispersion": 1.0})
    measured.losses[3, 4] = np.nan
    with pytest.raises(ValueError, match="non-finite"):
        FuzzyRouter(rule_base, NUM_LAYERS).calibrate(measured, 0.3)


def test_the_loss_increase_is_the_mean_increase_of_the_upper_half_cut_to_its_range() -> None:
    losses = np.array([[1.0, 5.0, 1.1, 1.3], [1.0, 1.0, 90.0, 90.0], [9.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(skip_loss_increase(losses), [0.2, *TARGET_RANGE[::-1]])


def test_the_range_of_a_feature_spans_98_percent_and_never_nothing() -> None:
    features = np.stack([np.linspace(0, 1, 101), np.full(101, 0.3)], axis=1)
    low, high = feature_range(features)
    np.testing.assert_allclose([low[0], high[0]], [0.01, 0.99])
    assert high[1] - low[1] == pytest.approx(1e-6)
    scaled = scale(features, low, high)
    assert scaled.min() == 0 and scaled.max() == 1 and np.isfinite(scaled).all()


def test_rank_correlation_of_a_constant_is_zero() -> None:
    ramp = np.arange(9.0)
    assert rank_correlation(ramp, np.ones(9)) == rank_correlation(np.ones(9), ramp) == 0
    assert rank_correlation(ramp, -(ramp**3)) == pytest.approx(-1)
