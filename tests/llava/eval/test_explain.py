"""Promises of the explanation of one question by a routed model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fuzzyroe.routers.fuzzy import FuzzyRouter
from fuzzyroe.rules.yaml_io import load_rule_base
from llava.eval.explain import explain_question
from llava.model.builder import Checkpoint
from llava.model.llava_llama import attach_routing

QUESTION = "w1 w2 w3 ?"


@pytest.fixture
def fuzzy(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose fuzzy router skips layer 1 always, layer 2 never and nothing at budget 0."""
    router = FuzzyRouter(load_rule_base("default").interpolate(), num_layers=4, num_budgets=2)
    router.budget_ratios.copy_(torch.tensor([0.0, 0.5]))
    router.budget_thresholds[1] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    router.set_skip_rate(0.5)
    attach_routing(checkpoint.model, router, adapter_width=4)
    return checkpoint


def test_explanation_fits_what_the_router_does(fuzzy):
    found = explain_question(fuzzy, QUESTION, template="v1", max_new_tokens=3)
    assert (found.kept, found.skipped, found.target_skip_ratio) == ((2, 3), (0, 1), 0.5)
    assert found.thresholds == (1.0, 1.0, 0.0, 0.0)
    assert list(found.rules.features) == ["image_dispersion", "text_dispersion", "question_length"]
    assert found.rules.score == pytest.approx(found.percentile, abs=1e-3)  # an uncalibrated router's scores are uniform
    assert found.answer


def test_budget_changes_the_layers_but_not_the_score(fuzzy):
    first = explain_question(fuzzy, QUESTION, max_new_tokens=1)
    second = explain_question(fuzzy, QUESTION, skip_rate=0.0, max_new_tokens=1)
    assert second.skipped == () and second.rules == first.rules
    with pytest.raises(ValueError, match="outside the calibrated range"):
        explain_question(fuzzy, QUESTION, skip_rate=0.9)


def test_image_changes_the_image_features(fuzzy, tmp_path):
    Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / "noise.png")
    without = explain_question(fuzzy, QUESTION, max_new_tokens=1)
    with_image = explain_question(fuzzy, QUESTION, tmp_path / "noise.png", max_new_tokens=1)
    assert without.raw_features["image_dispersion"] == 0 < with_image.raw_features["image_dispersion"]
    assert without.rules.words["image_dispersion"] == "low"


def test_an_image_tag_in_the_question_is_the_place_of_the_image(fuzzy, tmp_path):
    Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / "noise.png")
    plain = explain_question(fuzzy, QUESTION, tmp_path / "noise.png", max_new_tokens=2)
    assert explain_question(fuzzy, f"<image>\n{QUESTION}", tmp_path / "noise.png", max_new_tokens=2) == plain
    with pytest.raises(ValueError, match="The text has 1 <image> markers, but there are 0 images"):
        explain_question(fuzzy, f"<image>\n{QUESTION}")


def test_the_template_is_the_one_of_the_training(fuzzy):
    expected = explain_question(fuzzy, QUESTION, template="digits", max_new_tokens=2)
    assert explain_question(fuzzy, QUESTION, max_new_tokens=2) != expected
    fuzzy.model.config.conv_template = "digits"
    assert explain_question(fuzzy, QUESTION, max_new_tokens=2) == expected


def test_only_fuzzy_routers_are_explained(checkpoint):
    with pytest.raises(ValueError, match="tiny is dense; only fuzzy rules can be explained"):
        explain_question(checkpoint, QUESTION)


def test_other_routers_are_not_explained(routed):
    with pytest.raises(ValueError, match="is routed by a LengthRouter"):
        explain_question(routed, QUESTION)
