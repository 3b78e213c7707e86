"""The feature study finds what was planted, and says so."""

from __future__ import annotations

import numpy as np
import pytest

from fuzzyroe.calibrate import Measurements
from fuzzyroe.features import FEATURES

NAMES, CONSTANT = tuple(FEATURES), ("image_entropy", "text_entropy", "cross_modal_similarity")


@pytest.fixture(scope="module")
def study(load_script):
    return load_script("playground/feature_study.py")


@pytest.fixture(scope="module")
def measured() -> Measurements:
    """400 turns whose loss increases with edge density and shortness of the question."""
    rng = np.random.default_rng(0)
    features = rng.random((600, len(NAMES)))
    features[:, [NAMES.index(name) for name in CONSTANT]] = 0.5
    edges, length = (features[:, NAMES.index(name)] for name in ("edge_density", "question_length"))
    increase = np.exp(2 * edges - 2 * length)[:, None] * np.linspace(0, 1, 7) ** 2
    losses = 0.5 + increase + 0.1 * rng.standard_normal(increase.shape)
    return Measurements(NAMES, features[:400], losses[:400], [3, 5, 2, 7, 4, 6], features)


@pytest.fixture(scope="module")
def numbers(study, measured: Measurements) -> dict:
    return study.study(measured, num_layers=12, rate=0.3)


def test_planted_features_lead_alone_and_in_triples(numbers: dict) -> None:
    first, second, *others = numbers["alone"].items()
    assert {first[0], second[0]} == {"edge_density", "question_length"}
    correlation = {name: entry["correlation"] for name, entry in numbers["alone"].items()}
    assert correlation["edge_density"] > 0.5 and correlation["question_length"] < -0.5
    assert all(abs(entry["correlation"]) < 0.2 for _, entry in others)
    assert len(numbers["triples"]) == 10  # of the five features that vary
    best = numbers["triples"][0]
    assert {"edge_density", "question_length"} <= set(best["names"])
    assert best["held_out"] > 0.8 and best["saving"] > 0.2
    assert numbers["triples"][-1]["held_out"] < 0.6
    shipped = {name: entry["held_out"] for name, entry in numbers["shipped"].items()}
    assert best["held_out"] > shipped["default"] > abs(shipped["published"])
    low, high = numbers["best_minus_default"]
    assert 0 < low < best["held_out"] - shipped["default"] < high


def test_the_halves_are_apart_and_share_what_has_no_label(study, measured: Measurements) -> None:
    (first, second), (again, _) = study.halves(measured)
    assert np.array_equal(np.concatenate([first.losses, second.losses]), measured.losses) and again is second
    assert len(first.score_features) == len(second.score_features) == 200 + 200
    assert np.array_equal(first.score_features[200:], measured.score_features[400:])


def test_the_page_holds_the_numbers(study, numbers: dict) -> None:
    conditions = {"model": "a/model", "command": "make it", "seconds": 7.0, "python": "3", "torch": "2"}
    page = study.to_markdown(numbers, conditions, num_triples=2)
    assert f"| `edge_density` | {numbers['alone']['edge_density']['correlation']:+.3f} |" in page
    assert "400 turns" in page and "`a/model`" in page and "Made by `make it` in 7 s" in page
    assert page.count("| `") == len(NAMES) + 2


def test_measurements_survive_a_file(study, measured: Measurements, tmp_path) -> None:
    study.save_measured(measured, 12, "a/model", tmp_path / "m.npz")
    read, num_layers, model = study.load_measured(tmp_path / "m.npz")
    assert (num_layers, model) == (12, "a/model")
    assert read.feature_names == measured.feature_names and read.layer_order == measured.layer_order
    assert np.array_equal(read.losses, measured.losses) and np.array_equal(read.score_features, measured.score_features)
