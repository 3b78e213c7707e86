"""Promises of the linear score: it is linear, follows its targets, and plans as the fuzzy router does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fuzzyroe.calibrate import Measurements
from fuzzyroe.features import FEATURES
from fuzzyroe.routers import FuzzyRouter, LinearScoreRouter
from fuzzyroe.rules import load_rule_base, save_rule_base

PRIOR = load_rule_base("default").interpolate()
WEIGHTS = np.array([0.8, -0.5, 0.1])


@pytest.fixture(scope="module")
def examples() -> tuple[np.ndarray, np.ndarray]:
    """Features in [0, 1], (400, 3), and targets that are linear in them, (400,)."""
    features = np.random.default_rng(0).uniform(size=(400, 3))
    return features, 0.2 + features @ WEIGHTS


def test_scores_are_an_increasing_affine_function_of_a_linear_target(examples) -> None:
    features, targets = examples
    scores = LinearScoreRouter.fit_score(PRIOR, features, targets).evaluate(features)
    slope, constant = np.polyfit(targets, scores, 1)
    assert slope > 0
    assert np.abs(scores - (slope * targets + constant)).max() < 0.02  # the ridge takes one example's worth
    assert 0 <= scores.min() and scores.max() <= 1


def test_the_score_is_linear_between_any_two_points(examples) -> None:
    fitted = LinearScoreRouter.fit_score(PRIOR, *examples)
    first, second = np.random.default_rng(1).uniform(size=(2, 50, 3))
    middle = fitted.evaluate((first + second) / 2)
    assert middle == pytest.approx((fitted.evaluate(first) + fitted.evaluate(second)) / 2, abs=1e-12)


def test_targets_that_say_nothing_give_a_constant_score(examples) -> None:
    fitted = LinearScoreRouter.fit_score(PRIOR, examples[0], np.full(400, 0.7))
    assert np.ptp(fitted.evaluate(examples[0])) < 1e-12


def test_a_rule_base_file_keeps_the_score(examples, tmp_path) -> None:
    fitted = LinearScoreRouter.fit_score(PRIOR, *examples)
    save_rule_base(fitted, tmp_path / "rule_base.yaml")
    again = load_rule_base(str(tmp_path / "rule_base.yaml"))
    assert again.evaluate(examples[0]) == pytest.approx(fitted.evaluate(examples[0]), abs=1e-12)


def test_calibration_fits_either_score_with_the_same_budgets_and_can_fit_again() -> None:
    generator = np.random.default_rng(2)
    features = generator.uniform(size=(96, len(FEATURES)))
    hardness = features[:, list(FEATURES).index("text_dispersion")]
    losses = 0.1 + hardness[:, None] * np.array([0.0, 0.1, 0.4, 1.5])
    measured = Measurements(tuple(FEATURES), features, losses, [2, 1, 3], features)
    for kind in (FuzzyRouter, LinearScoreRouter):
        router, report = kind(PRIOR, 4).calibrate(measured, 0.4)
        again, _ = router.calibrate(measured, 0.4)
        assert type(router) is type(again) is kind
        assert report["score_correlation"] > 0.7
        assert float(router.thresholds().mean()) == pytest.approx(0.4, abs=1e-6)
        names = [list(FEATURES).index(name) for name in router.antecedents]
        raw = torch.as_tensor(features[:, names], dtype=torch.float32)
        assert torch.allclose(router.rules(router.scale(raw)), again.rules(again.scale(raw)), atol=1e-5)
