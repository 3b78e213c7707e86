"""A rule base cannot be changed, checks itself, and gives consistent variants of itself."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from fuzzyroe.rules import Consequent, FuzzyRuleBase, LinguisticVariable


def test_rule_bases_are_immutable_and_compare_by_value(complete):
    with pytest.raises(dataclasses.FrozenInstanceError):
        complete.name = "other"
    with pytest.raises(ValueError, match="read-only"):
        complete.table[0, 0, 0] = 1
    assert complete == copy.deepcopy(complete) == pickle.loads(pickle.dumps(complete))
    assert complete != complete.flip_direction((-1, 1, 1))


def test_the_order_of_rules_does_not_matter():
    variable = LinguisticVariable("x", (0, 1), ("low", "medium", "high"), (0, 0.5, 1))
    rules = {("low",): 0.1, ("medium",): 0.3, ("high",): 0.2}
    backwards = dict(reversed(rules.items()))
    first, second = (
        FuzzyRuleBase.from_rules("r", [variable], Consequent("y", (0, 1)), given) for given in (rules, backwards)
    )
    assert first == second


def test_reorienting_mirrors_the_surface_and_undoes_itself(complete):
    turned = complete.flip_direction((-1, 1, -1))
    points = np.random.default_rng(0).random((50, 3))
    mirrored = np.where([True, False, True], 1 - points, points)  # the default peaks are symmetric
    np.testing.assert_allclose(turned.evaluate(points), complete.evaluate(mirrored))
    assert [v.monotone for v in turned.antecedents] == ["decreasing", "increasing", "decreasing"]
    assert turned.monotonicity_violations() == []
    assert turned.flip_direction((-1, 1, -1)) == dataclasses.replace(complete, comments={})
    with pytest.raises(ValueError, match="1 or -1 for each"):
        complete.flip_direction((0, 1, 1))


def test_reorienting_commutes_with_interpolating(sparse):
    signs = (1, -1, -1)
    np.testing.assert_allclose(
        sparse.flip_direction(signs).interpolate().table, sparse.interpolate().flip_direction(signs).table
    )
    fewer = sparse.flip_direction(signs).interpolate(selection="closest_3").table
    np.testing.assert_allclose(fewer, np.flip(sparse.interpolate(selection="closest_3").table, (1, 2)))


def test_moving_knots_keeps_the_consequents_with_their_terms(complete):
    features = np.random.default_rng(0).beta(2, 6, (300, 3))
    moved = complete.with_quantile_knots(features)
    np.testing.assert_array_equal(moved.table, complete.table)
    np.testing.assert_allclose(moved.antecedents[1].peaks, np.quantile(features[:, 1], [1 / 6, 1 / 2, 5 / 6]))
    medium = [[variable.peaks[1] for variable in moved.antecedents]]
    assert moved.evaluate(np.array(medium))[0] == pytest.approx(complete.table[1, 1, 1])
    with pytest.raises(ValueError, match="pass one column per antecedent"):
        complete.with_quantile_knots(features[:, :2])


def test_rescaling_keeps_the_order_and_round_trips():
    consequent = Consequent("y", (0, 1.5), (0, 1))
    np.testing.assert_allclose(consequent.to_output([0, 0.75, 1.5]), [0, 0.5, 1])
    np.testing.assert_allclose(consequent.from_output(consequent.to_output([0.3, 1.1])), [0.3, 1.1])


def test_violations_name_the_rules_and_the_size():
    variable = LinguisticVariable("x", (0, 1), ("low", "medium", "high"), (0, 0.5, 1), "decreasing")
    rule_base = FuzzyRuleBase.from_rules("odd", [variable], Consequent("y", (0, 1)), {("low",): 0.5, ("high",): 0.75})
    assert rule_base.monotonicity_violations() == [(("high",), ("low",), 0.25)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a b"}, "not an identifier"),
        ({"antecedents": ()}, "one or more antecedents"),
        ({"consequent": Consequent("a", (0, 1))}, "different names"),
        ({"table": np.zeros((3, 4, 3))}, "one cell per combination"),
        ({"table": np.full((2, 4, 3), 1.5)}, r"values in \[0.0, 1.0\] are allowed"),
        ({"table": np.full((2, 4, 3), np.inf)}, "consequent inf"),
        ({"table": np.full((2, 4, 3), np.nan)}, "no rule at all"),
        ({"source": np.full((2, 4, 3), "guess")}, "correct the sources"),
        ({"source": np.full((2, 4, 3), "fitted")}, "fitted cells without prior_table"),
        ({"prior_table": np.zeros((2, 4, 3))}, "or the reverse"),
        ({"non_finite": np.nan}, "use 1.0 to run every layer"),
    ],
)
def test_an_inconsistent_rule_base_is_refused(uneven, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(uneven, **change)


def test_rules_and_points_that_do_not_fit_are_refused(sparse, complete):
    variable = LinguisticVariable("x", (0, 1), ("low", "high"), (0, 1))
    with pytest.raises(ValueError, match="correct its terms"):
        FuzzyRuleBase.from_rules("r", [variable], Consequent("y", (0, 1)), {("huge",): 0.5})
    with pytest.raises(ValueError, match="but to evaluate it every combination"):
        sparse.evaluate(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="drop non-finite rows"):
        complete.evaluate(np.full((1, 3), np.nan))
