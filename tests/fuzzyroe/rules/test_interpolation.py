"""Rule interpolation gives the values of the literature and of the published base, and keeps what was given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzzyroe.rules import Consequent, FuzzyRuleBase, InterpolationOptions, LinguisticVariable, conclude
from fuzzyroe.rules.explain import find_disagreements
from fuzzyroe.rules.interpolation import (
    METHODS,
    SparseRules,
    fuzzy_set,
    interpolate_closest,
    interpolate_cuts,
    interpolate_flanking,
    is_valid,
    representative,
    transform,
    transformation_between,
)

# consequents of the 12 missing cells on the raw scale, in row-major order, before any projection
MISSING = ["001", "010", "012", "021", "101", "110", "112", "121", "201", "210", "212", "221"]
PUBLISHED_COMPLETIONS = {
    "nearest_two": ([0.167, 0.167, 0.333, 0.333, 0.5, 0.416, 0.584, 0.584, 0.834, 0.834, 1.0, 1.083], 3),
    "koczy_hirota": ([0.167, 0.167, 0.5, 0.5, 0.5, 0.5, 0.834, 0.834, 0.834, 0.917, 1.25, 1.333], 0),
    "scale_and_move": ([0.167, 0.167, 0.5, 0.5, 0.5, 0.5, 0.833, 0.833, 0.833, 0.917, 1.25, 1.333], 0),
    "koczy_hirota_stabilised": ([0.368, 0.37, 0.546, 0.548, 0.552, 0.561, 0.738, 0.747, 0.773, 0.805, 0.981, 1.014], 9),
    "additive": ([0.114, 0.141, 0.475, 0.503, 0.414, 0.442, 0.775, 0.803, 0.847, 0.875, 1.208, 1.236], 0),
}


def missing_values(rule_base, sparse):
    return rule_base.table[np.isnan(sparse.table)]


def neighbours_in_wrong_order(rule_base):
    return sum(int((np.diff(rule_base.table, axis=axis) < -1e-9).sum()) for axis in range(3))


@pytest.mark.parametrize("method", PUBLISHED_COMPLETIONS)
def test_the_twelve_missing_cells_of_the_published_base(sparse, method):
    expected, violations = PUBLISHED_COMPLETIONS[method]
    completed = sparse.interpolate(method, monotone=False)
    assert ["".join(map(str, cell)) for cell in np.argwhere(np.isnan(sparse.table))] == MISSING
    np.testing.assert_allclose(missing_values(completed, sparse), expected, atol=1.1e-3)
    assert neighbours_in_wrong_order(completed) == violations


def rules_of(rule_base):
    """The rules of a table with the observation of each missing cell, (12, 3, 4)."""
    sets = np.stack([variable.fuzzy_sets() for variable in rule_base.antecedents])  # (3, terms, 4)
    is_given = ~np.isnan(rule_base.table)
    cells, missing = np.argwhere(is_given), np.argwhere(~is_given)
    singletons = np.repeat(rule_base.table[is_given][:, None], 4, axis=1)
    axes = np.arange(3)
    return SparseRules(sets[axes, cells], singletons, np.ones(3), np.ones(3)), sets[axes, missing]


def test_slopes_are_measured_and_bend_to_the_declared_directions(sparse):
    rules, _ = rules_of(sparse)
    np.testing.assert_allclose(rules.slopes, (0.7336, 0.389, 0.3333), atol=1e-4)  # about (2 i1 + i2 + i3) / 6
    turned = SparseRules(rules.antecedents, rules.consequents, rules.ranges, np.array([-1, 0, 1]))
    assert turned.slopes[0] == 0 and turned.slopes[1] == rules.slopes[1]


def test_rules_on_a_plane_are_extrapolated_exactly():
    cells = np.array([(0, 0), (0, 1), (1, 0), (2, 2)])
    rules = [([(x - 1, x, x + 1), (y - 1, y, y + 1)], 0.1 + 0.3 * x + 0.2 * y) for x, y in cells]
    concluded = conclude(rules, [(2, 3, 4), (0, 1, 2)], selection="closest_3")
    np.testing.assert_allclose(concluded, 0.1 + 0.9 + 0.2, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_completion_holds_given_cells_bit_for_bit_and_is_monotone(sparse, method):
    completed = sparse.interpolate(method)
    given = ~np.isnan(sparse.table)
    assert completed.is_complete and completed.monotonicity_violations() == []
    np.testing.assert_array_equal(completed.table[given], sparse.table[given])
    assert (completed.source[given] == "expert").all() and (completed.source[~given] == "interpolated").all()


BENCHMARK = (
    np.stack([fuzzy_set((0, 5, 6)), fuzzy_set((11, 13, 14))])[:, None],
    np.stack([fuzzy_set((0, 2, 4)), fuzzy_set((10, 11, 13))]),
    fuzzy_set((7, 8, 9))[None],
)


def test_scale_and_move_gives_the_benchmark_of_the_literature():
    antecedents, consequents, observation = BENCHMARK
    conclusion = interpolate_flanking(observation, antecedents, consequents)
    np.testing.assert_allclose(conclusion, (5.84, 6.26, 6.26, 7.38), atol=5e-3)


def test_koczy_hirota_refuses_its_invalid_benchmark_conclusion():
    antecedents, consequents, observation = BENCHMARK
    with pytest.raises(ValueError, match=r"\[6.3636, 5.375, 5.375, 7.375\] is no fuzzy set"):
        interpolate_cuts(observation, antecedents, consequents, np.ones(1))


SETS = st.lists(st.integers(0, 100), min_size=4, max_size=4).map(lambda points: fuzzy_set(sorted(points)))


@given(SETS, SETS)
def test_a_transformation_carries_its_source_into_its_target(source, target):
    if source[3] == source[0]:
        return
    source = source + representative(target) - representative(source)
    carried = transform(source, transformation_between(source, target))
    slopes = np.diff(source)[[0, 2]]
    if slopes.min() > 0 and target[3] > target[0]:  # else there is no slope to move along
        np.testing.assert_allclose(carried[[0, 3]], target[[0, 3]], atol=1e-8)
        np.testing.assert_allclose(carried, target, atol=1e-8)
    assert is_valid(carried) and np.isclose(representative(carried), representative(target))


@given(st.lists(SETS, min_size=3, max_size=3), SETS, SETS)
def test_scale_and_move_always_concludes_a_fuzzy_set(sets, one, other):
    first, observation, second = sorted(sets, key=representative)
    if representative(first) == representative(second):
        return
    rules, consequents = np.stack([first, second])[:, None], np.stack([one, other])
    conclusion = interpolate_flanking(observation[None], rules, consequents)
    span = np.abs(conclusion).max() + 1
    assert is_valid(conclusion, 1e-9 * span)
    assert is_valid(interpolate_closest(observation[None], rules, consequents, np.ones(1), np.ones(1)), 1e-6)


LITERATURE = [([(0, 5, 6)], (0, 2, 4)), ([(11, 13, 14)], (10, 11, 13))]


@pytest.mark.parametrize(
    ("method", "conclusion"),
    [
        ("scale_and_move", (5.84, 6.26, 6.26, 7.38)),
        # positions 11/3 and 38/3, observed 8: distances 13/3 and 14/3
        ("nearest_two", (130 / 27, 171 / 27, 171 / 27, 225 / 27)),
    ],
)
def test_the_example_of_the_literature(method, conclusion):
    np.testing.assert_allclose(conclude(LITERATURE, [(7, 8, 9)], method), conclusion, atol=5e-3)


@pytest.mark.parametrize("method", ["koczy_hirota", "koczy_hirota_stabilised"])
def test_both_koczy_hirota_methods_refuse_the_example_of_the_literature(method):
    with pytest.raises(
        ValueError, match=r"\[6.3636, 5.375, 5.375, 7.375\] is no fuzzy set.*use method 'scale_and_move'"
    ):
        conclude(LITERATURE, [(7, 8, 9)], method, ranges=[14])


PARALLEL = [
    ([(x, x + 1, x + 2), (y, y + 1, y + 2)], (x + y, x + y + 1, x + y + 3, x + y + 4))
    for x, y in [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
]


@pytest.mark.parametrize("method", METHODS)
def test_trapezoid_consequents_are_concluded_by_every_method(method):
    conclusion = conclude(PARALLEL, [(2, 3, 4), (0, 1, 2)], method)
    assert conclusion.shape == (4,) and is_valid(conclusion)
    np.testing.assert_allclose(np.diff(conclusion), (1, 2, 1), atol=1e-9)  # all rules conclude this shape
    if method != "koczy_hirota_stabilised":  # the far rules pull there
        assert conclusion[0] == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_an_observed_rule_concludes_its_own_consequent_whatever_the_method(method):
    for antecedents, consequent in LITERATURE:
        np.testing.assert_array_equal(conclude(LITERATURE, antecedents, method), fuzzy_set(consequent))


def test_additive_conclusions_whose_ends_cross_are_refused():
    rules = [([0, 0], (0, 4, 8)), ([0, 1], 1), ([1, 0], 2)]
    with pytest.raises(ValueError, match="additive conclusion .* is no fuzzy set"):
        conclude(rules, [1, 1], "additive")  # 1 + 2 - (0, 4, 8) would have to widen backwards


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(SETS, SETS, SETS), min_size=2, max_size=6), SETS, SETS)
def test_nearest_two_and_scale_and_move_always_conclude_a_fuzzy_set(rows, one, other):
    rules = [([first, second], consequent) for first, second, consequent in rows]
    for method in ("nearest_two", "scale_and_move"):
        assert is_valid(conclude(rules, [one, other], method, ranges=[100, 100]), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_tables_are_completed_by_the_conclusions_of_their_rules(sparse, method):
    rules, observations = rules_of(sparse)
    shapes = [(list(sets), value) for sets, value in zip(rules.antecedents, rules.consequents[:, 0], strict=True)]
    expected = [representative(conclude(shapes, list(o), method, ranges=[1] * 3, signs=[1] * 3)) for o in observations]
    found = missing_values(sparse.interpolate(method, monotone=False), sparse)
    np.testing.assert_allclose(found, np.clip(expected, 0, 1.5), atol=1e-9)


def test_rules_and_observations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        conclude([([1], 2), ([1, 2], 3)], [1])
    with pytest.raises(ValueError, match="equally many"):
        conclude([], [1])
    with pytest.raises(ValueError, match="The observation has 2 sets; 1 are allowed"):
        conclude(LITERATURE, [1, 2])
    with pytest.raises(ValueError, match="is not a fuzzy set"):
        conclude(LITERATURE, [(3, 2, 1)])


def test_a_rule_that_is_observed_concludes_its_own_consequent():
    antecedents, consequents, _ = BENCHMARK
    np.testing.assert_allclose(interpolate_flanking(antecedents[1], antecedents, consequents), consequents[1])
    np.testing.assert_allclose(interpolate_cuts(antecedents[1], antecedents, consequents, np.ones(1)), consequents[1])


def test_flanking_rules_must_flank_and_differ():
    antecedents, consequents, observation = BENCHMARK
    with pytest.raises(ValueError, match="0 to 1 is flanked"):
        interpolate_flanking(observation + 10, antecedents, consequents)
    with pytest.raises(ValueError, match="equal antecedents"):
        interpolate_flanking(observation, antecedents[[0, 0]], consequents)


def test_singletons_triangles_and_trapezoids_are_sets_and_nothing_else_is():
    assert fuzzy_set(2).tolist() == [2, 2, 2, 2] and fuzzy_set((0, 1, 3)).tolist() == [0, 1, 1, 3]
    for points in [(0, 1), (0, 2, 1), (0, 1, 2, np.inf), range(5)]:
        with pytest.raises(ValueError, match="is not a fuzzy set"):
            fuzzy_set(points)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["scale_and_move", "nearest_two", "koczy_hirota_stabilised"]))
def test_random_monotone_rules_are_completed_monotonely_inside_their_hull(seed, method):
    rng = np.random.default_rng(seed)
    table = rng.random((3, 3, 3))
    for axis in range(3):
        table = np.sort(table, axis=axis)
    hidden = rng.random(table.shape) < 0.45
    hidden.flat[[0, 26]] = False
    signs = rng.choice(["increasing", "decreasing"], 3)
    table = np.flip(np.where(hidden, np.nan, table), [axis for axis in range(3) if signs[axis] == "decreasing"])
    variables = [
        LinguisticVariable(n, (0, 1), ("l", "m", "h"), (0, 0.5, 1), s) for n, s in zip("abc", signs, strict=True)
    ]
    source = np.where(np.isnan(table), "none", "expert")
    rule_base = FuzzyRuleBase("random", variables, table, source, Consequent("y", (0, 1)))
    completed = rule_base.interpolate(method)
    assert completed.monotonicity_violations() == []
    assert np.nanmin(table) <= completed.table.min() and completed.table.max() <= np.nanmax(table)


def test_contradicting_rules_are_kept_and_reported(caplog):
    variable = LinguisticVariable("x", (0, 1), ("low", "medium", "high"), (0, 0.5, 1), "increasing")
    rules = {("low",): 0.8, ("high",): 0.2}
    completed = FuzzyRuleBase.from_rules("odd", [variable], Consequent("y", (0, 1)), rules).interpolate()
    np.testing.assert_allclose(completed.table, (0.8, 0.5, 0.2))
    assert "contradict its directions" in caplog.text


def test_a_single_rule_is_a_nearly_constant_router_with_a_warning(caplog):
    variable = LinguisticVariable("x", (0, 1), ("low", "high"), (0, 1), "increasing")
    completed = FuzzyRuleBase.from_rules("one", [variable], Consequent("y", (0, 1)), {("low",): 0.4}).interpolate()
    np.testing.assert_allclose(completed.table, 0.4)
    assert "single rule" in caplog.text


def test_methods_that_differ_are_reported_with_the_largest_difference_first(sparse):
    assert find_disagreements(sparse) == ()
    found = find_disagreements(sparse, ("scale_and_move", "nearest_two"), tolerance=0.1)
    assert found[0].terms == ("high", "medium", "high")
    assert found[0].values == pytest.approx({"scale_and_move": 1.25, "nearest_two": 1.0})
    assert found[0].spread == pytest.approx(0.25 / 1.5)
    assert [item.spread for item in found] == sorted((item.spread for item in found), reverse=True)
    assert found[-1].spread > 0.1


def test_additive_refuses_a_term_without_any_rule():
    variable = LinguisticVariable("x", (0, 1), ("low", "medium", "high"), (0, 0.5, 1))
    rule_base = FuzzyRuleBase.from_rules("gap", [variable], Consequent("y", (0, 1)), {("low",): 0.1, ("high",): 1})
    with pytest.raises(ValueError, match="needs a rule for every term"):
        rule_base.interpolate("additive")


def test_unknown_options_are_refused_by_name():
    with pytest.raises(KeyError, match="known: .*additive.*scale_and_move"):
        InterpolationOptions("spline")
    with pytest.raises(ValueError, match="'flanking' or 'closest_N'"):
        InterpolationOptions(selection="nearest")
    with pytest.raises(ValueError, match="'closest_N' is allowed"):
        InterpolationOptions(fallback="closest_0")
