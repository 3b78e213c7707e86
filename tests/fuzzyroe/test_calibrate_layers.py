"""Promises of fitting a table per layer, on synthetic examples of which one layer is worth more to some than others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fuzzyroe.calibrate import Measurements
from fuzzyroe.features import FEATURES
from fuzzyroe.routers import PerLayerFuzzyRouter
from fuzzyroe.rules import load_rule_base

NAMES = tuple(FEATURES)
NUM_LAYERS = 6
LENGTH = NAMES.index("question_length")


def measure(features: np.ndarray, score_features: np.ndarray) -> Measurements:
    """Layer 3 matters to long questions only, layer l costs 0.1 l to all."""
    rng = np.random.default_rng(1)
    dense = np.full((len(features), 1), 0.5)
    increases = 0.1 * np.arange(NUM_LAYERS) + 0.02 * rng.standard_normal((len(features), NUM_LAYERS))
    increases[:, 3] = 2 * features[:, LENGTH] + 0.02 * rng.standard_normal(len(features))
    increases[:, 0] = 0.0
    losses = dense + np.linspace(0, 1, 4)
    return Measurements(NAMES, features, losses, [1, 2, 4], score_features, dense + increases)


@pytest.fixture(scope="module")
def calibrated() -> tuple[PerLayerFuzzyRouter, dict]:
    rng = np.random.default_rng(0)
    measured = measure(rng.random((4000, len(NAMES))), rng.random((4096, len(NAMES))))
    return PerLayerFuzzyRouter(load_rule_base("default"), NUM_LAYERS).calibrate(measured, 0.3)


def keeps(router: PerLayerFuzzyRouter, raw: np.ndarray, skip_rate: float | None = None) -> torch.Tensor:
    columns = [NAMES.index(name) for name in router.antecedents]
    features = router.scale(torch.as_tensor(raw[:, columns], dtype=torch.float32))
    return router.keep_weights(router.rules(features).unsqueeze(1), skip_rate)[:, 0]


def test_a_layer_is_kept_where_it_is_worth_something(calibrated: tuple[PerLayerFuzzyRouter, dict]) -> None:
    router, _ = calibrated
    raw = np.full((2, len(NAMES)), 0.5)
    raw[:, LENGTH] = 0.05, 0.95
    short, long = keeps(router, raw, 0.4)
    assert short[3] == 0 and long[3] == 1
    assert short[5] == long[5] == 1 and short[1] == long[1] == 0


def test_the_mean_skip_rate_is_met_on_held_out_examples_and_grows_by_supersets(calibrated) -> None:
    router, _ = calibrated
    held_out = np.random.default_rng(5).random((8000, len(NAMES)))
    before = torch.ones(8000, NUM_LAYERS)
    for rate in (0.0, 0.1, 0.3, 0.5, 0.7):
        kept = keeps(router, held_out, rate)
        assert 1 - kept.mean().item() == pytest.approx(rate, abs=0.01)
        assert (kept <= before).all() and kept[:, 0].all()
        before = kept
    assert torch.equal(keeps(router, held_out), keeps(router, held_out, 0.3))


def test_without_evidence_every_example_ranks_the_layers_as_their_means_do() -> None:
    rng = np.random.default_rng(0)
    measured = measure(rng.random((400, len(NAMES))), rng.random((500, len(NAMES))))
    layers = np.broadcast_to(measured.layer_losses.mean(axis=0), measured.layer_losses.shape)
    router, report = PerLayerFuzzyRouter(load_rule_base("default"), NUM_LAYERS).calibrate(
        replace(measured, layer_losses=layers), 0.4
    )
    tables = router.rules.consequents.numpy()
    np.testing.assert_allclose(tables, np.broadcast_to(report["mean_increase_by_layer"], tables.shape), atol=1e-6)


def test_tables_follow_the_declared_directions(calibrated) -> None:
    router, report = calibrated
    tables = router.rules.consequents.numpy().reshape(*router.rule_base.shape, NUM_LAYERS)
    for axis, sign in enumerate(router.rule_base.signs):
        assert (sign * np.diff(tables, axis=axis) > -1e-6).all()
    assert len(report["rules"]) == 27 and len(report["rules"][0]["fitted"]) == NUM_LAYERS
    assert sum(rule["effective_examples"] for rule in report["rules"]) > 100


def test_single_layers_must_have_been_measured_and_the_rate_be_possible() -> None:
    rng = np.random.default_rng(0)
    measured = measure(rng.random((50, len(NAMES))), rng.random((50, len(NAMES))))
    router = PerLayerFuzzyRouter(load_rule_base("default"), NUM_LAYERS)
    with pytest.raises(ValueError, match="single_layers=True"):
        router.calibrate(replace(measured, layer_losses=None), 0.3)
    with pytest.raises(ValueError, match=r"range \[0, 0.833\]"):
        router.calibrate(measured, 0.9)
