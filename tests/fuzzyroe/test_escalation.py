"""Promises of escalation policies: doubt falls as the margin grows, a share is met without labels, options are data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from batches import pad, prompts_of_lengths
from fuzzyroe import RoutingState
from fuzzyroe.escalation import POLICIES, TAIL_QUANTILES, Escalation
from fuzzyroe.features import ANSWER_FEATURES, FEATURES, read_answer, when_known
from fuzzyroe.routers import FuzzyRouter, StaticRouter
from fuzzyroe.rules import Consequent, FuzzyRuleBase, LinguisticVariable, load_rule_base, save_rule_base

MARGINS = np.random.default_rng(0).beta(5, 1.5, size=2000)
READINGS = {
    "answer_margin": MARGINS,
    "answer_entropy": (1 - MARGINS) ** 2,
    "random_draw": np.random.default_rng(1).random(2000),
}


def test_the_margin_is_that_of_the_two_likeliest_tokens() -> None:
    answer = read_answer(torch.tensor([[2.0, 5.0, 4.0], [1.0, 1.0, -9.0]]))
    torch.testing.assert_close(answer.margin, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(ANSWER_FEATURES["answer_margin"](answer), torch.tensor([0.5, 0.0]))
    even = read_answer(torch.zeros(1, 7))
    torch.testing.assert_close(ANSWER_FEATURES["answer_entropy"](even), torch.ones(1))


@pytest.mark.parametrize("policy", ["fuzzy", "margin"])
def test_doubt_falls_as_the_margin_grows(policy) -> None:
    margins = np.linspace(0, 1, 400)
    doubts = Escalation.make(policy).doubts({"answer_margin": margins})
    assert (np.diff(doubts) <= 1e-12).all() and doubts[0] == 1 and doubts[-1] == 0


@pytest.mark.parametrize("policy", ["fuzzy", "margin", "random"])
@pytest.mark.parametrize(("share", "shallower"), [(0.0, 0.0), (0.1, 0.0), (0.2, 0.15), (0.55, 0.0), (1.0, 0.0)])
def test_calibration_without_labels_meets_the_shares(policy, share, shallower) -> None:
    escalation = Escalation.make(policy).calibrate(READINGS, share, shallower)
    levels = escalation.levels(escalation.doubts(READINGS))
    assert np.mean(levels == 2) == pytest.approx(share, abs=0.002)
    assert np.mean(levels == 1) == pytest.approx(shallower, abs=0.002)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5])
def test_the_prior_over_the_margin_alone_is_the_crisp_threshold(share) -> None:
    chosen = [
        made.levels(made.doubts(READINGS))
        for made in (Escalation.make(policy).calibrate(READINGS, share) for policy in ("fuzzy", "margin"))
    ]
    assert np.mean(chosen[0] != chosen[1]) <= 0.002


def test_calibration_puts_the_knots_into_the_tail() -> None:
    rules = Escalation.make("fuzzy").calibrate(READINGS, 0.2).rule_base
    np.testing.assert_allclose(rules.antecedents[0].peaks, np.quantile(MARGINS, TAIL_QUANTILES), atol=1e-9)
    assert rules.provenance["knots"] == {"examples": 2000} and not rules.monotonicity_violations()


def test_always_and_never_have_no_share() -> None:
    for policy, level in (("always", 2), ("never", 0)):
        escalation = Escalation.make(policy).calibrate(READINGS, 0.3)
        assert set(escalation.levels(escalation.doubts(READINGS))) == {level}


@pytest.mark.parametrize("policy", ["fuzzy", "margin"])
def test_an_answer_without_numbers_runs_all_layers(policy) -> None:
    escalation = Escalation.make(policy, all_from=0.9)
    assert escalation.levels(escalation.doubts({"answer_margin": np.array([np.nan, 0.99])})).tolist() == [2, 0]


def two_antecedents() -> FuzzyRuleBase:
    """Doubt by margin and by the length of the question: a long question is escalated sooner."""
    margin = LinguisticVariable("answer_margin", (0, 1), ("low", "high"), (0.2, 0.8), "decreasing")
    length = LinguisticVariable("question_length", (0, 1), ("short", "long"), (0.1, 0.9), "increasing")
    rules = {("low", "short"): 0.6, ("low", "long"): 1.0, ("high", "short"): 0.0, ("high", "long"): 0.4}
    return FuzzyRuleBase.from_rules("families", [margin, length], Consequent("doubt", (0, 1)), rules)


def test_rules_read_what_is_known_before_the_first_layer_too() -> None:
    escalation = Escalation("fuzzy", rule_base=two_antecedents())
    inputs = pad(prompts_of_lengths([3, 9]))
    readings = escalation.read_prompts(torch.randn(2, 9, 8), RoutingState.from_batch(inputs))
    assert list(readings) == ["question_length"]
    expected = torch.log1p(torch.tensor([3.0, 9.0])) / torch.log1p(torch.tensor(512.0))
    torch.testing.assert_close(readings["question_length"], expected)
    same_margin = {"answer_margin": np.array([0.5, 0.5]), "question_length": readings["question_length"].numpy()}
    short, long = escalation.doubts(same_margin)
    assert short < long


def test_features_say_when_they_are_known() -> None:
    assert {when_known(name) for name in FEATURES} == {"before the first layer"}
    assert {when_known(name) for name in ANSWER_FEATURES} == {"after the prefill"}
    with pytest.raises(KeyError, match="unknown"):
        when_known("mood")


def test_a_plan_cannot_read_the_answer() -> None:
    with pytest.raises(KeyError, match="known after the prefill only"):
        FuzzyRouter(load_rule_base("escalate"), 4)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_an_escalation_is_kept_with_the_options_of_its_router(policy, tmp_path) -> None:
    router = StaticRouter(4, target_skip_ratio=0.25)
    router.escalation = Escalation.make(policy, shallower_ratio=0.3).calibrate(READINGS, 0.2, 0.1)
    options = json.loads(json.dumps(router.save_options(tmp_path)))
    found = StaticRouter.build(options, 4, 8, lambda name: str(tmp_path / name))
    assert found.escalation == router.escalation and found.target_skip_ratio == 0.25
    router.escalation = None
    assert "escalation" not in router.save_options(tmp_path)


def test_rules_are_read_from_a_file(tmp_path) -> None:
    save_rule_base(two_antecedents(), tmp_path / "own.yaml")
    assert Escalation.make("fuzzy", str(tmp_path / "own.yaml")).rule_base.name == "families"


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(KeyError, match="unknown"):
        Escalation.make("mood")
    with pytest.raises(ValueError, match="no rules"):
        Escalation("fuzzy")
    with pytest.raises(ValueError, match="shallower_ratio"):
        Escalation.make("margin", shallower_ratio=1.0)
    with pytest.raises(ValueError, match="sum to at most 1"):
        Escalation.make("margin").calibrate(READINGS, 0.8, 0.3)
    strange = LinguisticVariable("mood", (0, 1), ("low", "high"), (0, 1))
    rules = FuzzyRuleBase.from_rules("r", [strange], Consequent("doubt", (0, 1)), {("low",): 0.0, ("high",): 1.0})
    with pytest.raises(KeyError, match="no features"):
        Escalation("fuzzy", rule_base=rules)
