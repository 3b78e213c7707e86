"""Promises of explanations, reviews and differences of rule bases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fuzzyroe.rules.explain import (
    compare_rule_bases,
    describe_memberships,
    evidence_of,
    expert_rules,
    explain_features,
    review_rule_base,
)
from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.variable import Consequent, LinguisticVariable
from fuzzyroe.rules.yaml_io import load_rule_base, shipped_rule_bases

DETAIL = LinguisticVariable("detail", (0.0, 1.0), ("low", "high"), (0.0, 1.0), "increasing")
LENGTH = LinguisticVariable("length", (0.0, 1.0), ("low", "medium", "high"), (0.0, 0.5, 1.0), "increasing")
RULES = {
    ("low", "low"): 0.0,
    ("low", "medium"): 0.2,
    ("low", "high"): 0.4,
    ("high", "low"): 0.5,
    ("high", "medium"): 0.7,
    ("high", "high"): 1.0,
}


def make_rule_base(rules=RULES, **options) -> FuzzyRuleBase:
    return FuzzyRuleBase.from_rules("small", (DETAIL, LENGTH), Consequent("effort", (0.0, 1.0)), rules, **options)


def test_explanation_names_the_rules_that_decide_the_score():
    rule_base = make_rule_base(comments={("high", "high"): "crowded and\nlong"})
    explanation = explain_features(rule_base, [0.8, 0.75], max_rules=2)
    assert explanation.features == {"detail": 0.8, "length": 0.75}
    assert explanation.memberships["length"] == {"low": 0.0, "medium": 0.5, "high": 0.5}
    assert explanation.words["detail"] == "mostly high (0.80), a little low (0.20)"
    assert explanation.words["length"] == "between medium (0.50) and high (0.50)"
    assert explanation.num_fired == 4
    assert [(rule.terms, round(rule.strength, 9)) for rule in explanation.fired] == [
        (("high", "medium"), 0.4),
        (("high", "high"), 0.4),
    ]
    assert explanation.fired[0].text == "if detail is high and length is medium then effort is 0.70"
    assert [rule.comment for rule in explanation.fired] == ["", "crowded and long"]
    assert explanation.score == pytest.approx(0.4 * 0.7 + 0.4 * 1.0 + 0.1 * 0.2 + 0.1 * 0.4)


def test_strengths_times_outputs_add_up_to_the_score():
    explanation = explain_features(make_rule_base(), [0.3, 0.6], max_rules=6)
    assert sum(rule.strength for rule in explanation.fired) == pytest.approx(1)
    assert sum(rule.strength * rule.output for rule in explanation.fired) == pytest.approx(explanation.score)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"low": 1.0, "medium": 0.0, "high": 0.0}, "low"),
        ({"low": 0.0, "medium": 0.004, "high": 0.996}, "high"),
        ({"low": 0.0, "medium": 0.19, "high": 0.81}, "mostly high (0.81), a little medium (0.19)"),
        ({"low": 0.45, "medium": 0.55, "high": 0.0}, "between low (0.45) and medium (0.55)"),
        ({}, "not a finite number"),
    ],
)
def test_memberships_in_words(degrees, words):
    assert describe_memberships(degrees) == words


def test_origin_tells_author_and_calibration():
    sparse = {terms: value for terms, value in RULES.items() if terms != ("low", "medium")}
    completed = make_rule_base(sparse).interpolate()
    assert explain_features(completed, [0.0, 0.5]).fired[0].origin == "interpolated"
    fitted = completed.fit(np.array([[0.0, 0.5], [1.0, 1.0]]), np.array([0.4, 0.9]))
    assert explain_features(fitted, [0.0, 0.5]).fired[0].origin == "interpolated, fitted"
    assert explain_features(fitted, [1.0, 1.0]).fired[0].origin == "expert, fitted"


def test_a_feature_that_is_not_finite_fires_nothing():
    explanation = explain_features(make_rule_base(non_finite=0.9), [math.nan, 0.5])
    assert (explanation.fired, explanation.num_fired, explanation.score) == ((), 0, 0.9)
    assert explanation.words == {"detail": "not a finite number", "length": "medium"}


def test_one_feature_per_antecedent_is_needed():
    with pytest.raises(ValueError, match=r"3 features were given; rule base 'small' takes 2: detail, length"):
        explain_features(make_rule_base(), [0.1, 0.2, 0.3])


def test_review_lists_what_the_expert_left_open():
    rules = {terms: value for terms, value in RULES.items() if terms[1] != "medium"}
    review = review_rule_base(make_rule_base(rules), methods=("scale_and_move", "nearest_two"), tolerance=0.9)
    assert (review.num_given, review.num_rules, review.is_ok) == (4, 6, True)
    assert review.missing == (("low", "medium"), ("high", "medium"))
    assert review.unused_terms == (("length", "medium"),)


def test_review_finds_rules_against_the_declared_direction():
    review = review_rule_base(make_rule_base({**RULES, ("high", "low"): 0.9}))
    assert not review.is_ok
    assert [(low, high) for low, high, _ in review.contradictions] == [(("high", "low"), ("high", "medium"))]
    assert review.contradictions[0][2] == pytest.approx(0.2)


def test_review_finds_cells_on_which_methods_differ():
    rules = {terms: value for terms, value in RULES.items() if terms != ("low", "medium")}
    (found,) = review_rule_base(make_rule_base(rules), tolerance=0.04).disagreements
    assert found.terms == ("low", "medium")
    assert found.values == pytest.approx({"scale_and_move": 0.2, "additive": 0.15})
    assert not review_rule_base(make_rule_base(rules), tolerance=0.06).disagreements


@pytest.mark.parametrize("name", shipped_rule_bases())
def test_shipped_rule_bases_can_be_reviewed(name):
    assert review_rule_base(load_rule_base(name)).num_given == (5 if name == "escalate" else 15)


def test_review_lists_rules_that_no_example_informed():
    assert review_rule_base(make_rule_base()).idle is None
    fitted = make_rule_base().fit(np.array([[1.0, 0.0]] * 3), np.array([0.5] * 3))
    idle = dict(review_rule_base(fitted).idle)
    assert len(idle) == 5 and ("high", "low") not in idle and set(idle.values()) == {0.0}
    assert evidence_of(fitted)[1, 0] == 3 and evidence_of(fitted.unfitted()) is None
    assert evidence_of(fitted.flip_direction([-1, 1])) is None


def test_expert_rules_come_back_after_completion_and_fit():
    sparse = make_rule_base({terms: value for terms, value in RULES.items() if terms != ("low", "medium")})
    fitted = sparse.interpolate().fit(np.array([[0.5, 0.5]]), np.array([0.9]))
    assert np.array_equal(expert_rules(fitted).table, sparse.table, equal_nan=True)
    assert expert_rules(fitted).missing_cells() == [("low", "medium")]


def test_equal_rule_bases_have_no_difference():
    assert compare_rule_bases(make_rule_base(), make_rule_base(description="another text")).is_empty


def test_difference_names_variables_and_rules():
    changed = make_rule_base({**RULES, ("low", "high"): 0.45}).with_knots([(0.1, 1.0), (0.0, 0.5, 1.0)])
    difference = compare_rule_bases(make_rule_base(), changed)
    assert difference.settings == ("detail: peaks 0.000, 1.000 -> 0.100, 1.000",)
    assert [(rule.terms, rule.first, rule.second) for rule in difference.rules] == [(("low", "high"), 0.4, 0.45)]


def test_difference_tells_a_missing_rule_from_a_completed_one():
    sparse = make_rule_base({terms: value for terms, value in RULES.items() if terms != ("low", "medium")})
    (rule,) = compare_rule_bases(sparse, sparse.interpolate()).rules
    assert (rule.first, rule.first_origin, rule.second_origin) == (None, "none", "interpolated")


def test_rules_over_other_variables_are_not_lined_up():
    other = FuzzyRuleBase.from_rules(
        "other", (DETAIL,), Consequent("effort", (0.0, 1.0)), {("low",): 0.0, ("high",): 1.0}
    )
    difference = compare_rule_bases(make_rule_base(), other)
    assert difference.settings == ("antecedents: detail, length -> detail",) and difference.rules is None
