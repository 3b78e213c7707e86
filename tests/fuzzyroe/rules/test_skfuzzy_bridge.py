"""scikit-fuzzy and the compiled tables agree, and its traps stay inside the bridge."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from skfuzzy import control

from fuzzyroe.rules import ZeroOrderTSK, compile_control_system, compile_rule_base, load_rule_base, skfuzzy_bridge
from fuzzyroe.rules.skfuzzy_bridge import to_control_system

NAMES = ["image_dispersion", "text_dispersion", "question_length"]


def random_points(rule_base, count, seed=0, margin=0.1):
    lower, upper = np.array([variable.universe for variable in rule_base.antecedents]).T
    spread = np.random.default_rng(seed).uniform(-margin, 1 + margin, (count, len(lower)))
    return lower + spread * (upper - lower)


@pytest.mark.parametrize("name", ["complete", "uneven"])
def test_firing_strengths_agree(name, request):
    rule_base = request.getfixturevalue(name)
    points = random_points(rule_base, 1000).astype(np.float32)
    expected = skfuzzy_bridge.firing_strengths(rule_base, points)
    actual = compile_rule_base(rule_base).firing_strengths(torch.from_numpy(points))
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["complete", "uneven"])
def test_box_consequents_evaluated_by_scikit_fuzzy_agree(name, request):
    rule_base = request.getfixturevalue(name)
    points = random_points(rule_base, 1000, margin=0)
    expected = skfuzzy_bridge.evaluate(rule_base, points)
    actual = compile_rule_base(rule_base)(torch.tensor(points, dtype=torch.float32))
    np.testing.assert_allclose(actual.numpy(), expected, atol=5e-5)


@pytest.mark.parametrize("name", ["complete", "uneven", "sparse"])
def test_a_rule_base_survives_the_way_through_a_control_system(name, request):
    rule_base = request.getfixturevalue(name)
    names = [variable.name for variable in rule_base.antecedents]
    back = compile_control_system(to_control_system(rule_base), names, rule_base.consequent.name)
    np.testing.assert_allclose(back.table, rule_base.output_table, atol=1e-9)
    for read, written in zip(back.antecedents, rule_base.antecedents, strict=True):
        assert (read.terms, read.peaks, read.universe) == (written.terms, written.peaks, written.universe)


def test_changing_one_consequent_term_of_the_control_system_changes_the_torch_output(complete):
    system = to_control_system(complete)
    before = ZeroOrderTSK.from_rule_base(compile_control_system(system, NAMES, "execute_weight"))
    node = next(system.consequents)
    node["constant_0"].mf = node["constant_1"].mf  # low, low, low now concludes what its neighbours do
    after = ZeroOrderTSK.from_rule_base(compile_control_system(system, NAMES, "execute_weight"))
    corner, opposite = torch.zeros(1, 3), torch.ones(1, 3)
    assert before(corner).item() == pytest.approx(0) and after(corner).item() == pytest.approx(0.111, abs=1e-6)
    assert before(opposite) == after(opposite)


def test_moving_one_antecedent_term_of_the_control_system_changes_the_torch_output(complete):
    system = to_control_system(complete)
    node = next(node for node in system.antecedents if node.label == NAMES[0])
    node.universe = np.array([0.0, 0.2, 1.0])  # the peak of medium moves from 0.5
    moved = compile_control_system(system, NAMES, "execute_weight")
    assert moved.antecedents[0].peaks == (0.0, 0.2, 1.0)
    points = torch.full((1, 3), 0.2)
    assert ZeroOrderTSK.from_rule_base(moved)(points) > compile_rule_base(complete)(points)


def test_compiling_keeps_the_output_for_non_finite_features_and_needs_every_rule(sparse):
    raw = load_rule_base("published").interpolate()
    assert compile_rule_base(raw)(torch.full((1, 3), torch.nan)).item() == raw.non_finite
    with pytest.raises(ValueError, match=r"call interpolate\(\) first"):
        compile_rule_base(sparse)


def test_verification_fails_on_wrong_knots(complete):
    module, system = compile_rule_base(complete), to_control_system(complete)
    module.knots[0, 1] += 1e-3
    with pytest.raises(RuntimeError, match="differ by"):
        skfuzzy_bridge.verify(module, system, NAMES, "execute_weight")


def test_nearly_constant_features_compile(complete):
    features = np.random.default_rng(0).random((50, 3))
    features[:, 1] = 0.7123
    compile_rule_base(complete.with_quantile_knots(features))


def test_no_warning_escapes_and_nothing_stays_in_scikit_fuzzy(complete):
    def count():
        owners = (control.Antecedent, control.Consequent, control.Rule, skfuzzy_bridge.Term)
        return sum(len(value.data) for owner in owners for value in vars(owner).values() if hasattr(value, "data"))

    before = count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_rule_base(complete)
        skfuzzy_bridge.evaluate(complete, random_points(complete, 3))
    assert count() == before


def test_a_users_own_simulation_is_left_alone(complete):
    system = to_control_system(complete)
    simulation = control.ControlSystemSimulation(system)
    for name in NAMES:
        simulation.input[name] = 0.3
    points = random_points(complete, 5)
    skfuzzy_bridge.firing_strengths(system, points, NAMES)
    skfuzzy_bridge.evaluate(system, points, NAMES, "execute_weight")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        simulation.compute()
    expected = complete.evaluate(np.full((1, 3), 0.3))
    assert simulation.output["execute_weight"] == pytest.approx(expected[0], abs=5e-5)


def test_threads_do_not_disturb_each_other(complete):
    system, module, results = to_control_system(complete), compile_rule_base(complete), {}

    def work(seed):
        points = random_points(complete, 40, seed)
        for _ in range(5):
            fired = skfuzzy_bridge.firing_strengths(system, points, NAMES)
        results[seed] = (fired.sum(axis=1), module(torch.tensor(points)).numpy(), fired.max(axis=1), points)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for total, output, largest, points in results.values():
        np.testing.assert_allclose(total, 1)
        np.testing.assert_allclose(output, complete.evaluate(points), atol=1e-6)
        np.testing.assert_allclose(largest, complete.firing_strengths(points).max(axis=1))


def small_system(spoiled=None):
    """Two rules over two variables with two terms, with one fault on request."""
    universe = np.array([0.0, 1.0])
    a, b = control.Antecedent(universe, "a"), control.Antecedent(universe, "b")
    for node in (a, b):
        node["low"], node["high"] = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    if spoiled == "gap":
        a["low"].mf = np.array([1.0, 0.4])
    width = 0.1 if spoiled == "wide" else 1e-3
    y = control.Consequent(np.array([0.0, 0.2 - width, 0.2, 0.2 + width, 0.7 - width, 0.7, 0.7 + width, 1.0]), "y")
    y["small"], y["large"] = np.eye(8)[2], np.eye(8)[5]
    both = a["low"] & b["low"]
    first = {"or": a["low"] | b["low"], "not": ~a["low"] & b["low"], "twice": a["low"] & a["high"] & b["low"]}
    second = {"weight": y["large"] % 0.5, "shared": y["small"]}
    and_func = np.fmin if spoiled == "minimum" else np.multiply
    rules = [
        control.Rule(first.get(spoiled, both), y["small"], "r1", and_func),
        control.Rule(both if spoiled == "conflict" else a["high"], second.get(spoiled, y["large"]), "r2", and_func),
    ]
    return control.ControlSystem(rules)


def test_an_antecedent_left_out_means_any():
    read = compile_control_system(small_system(), ["a", "b"], "y")
    np.testing.assert_allclose(read.table, [[0.2, np.nan], [0.7, 0.7]])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("minimum", "does not use the product as AND"),
        ("wide", "narrower than 1 %"),
        ("conflict", "'r1' and 'r2' conclude 0.2 and 0.7 for the same"),
        ("shared", "set accumulation_method = np.add"),
        ("gap", "not triangles that sum to one"),
        ("or", "uses OR or NOT"),
        ("not", "uses OR or NOT"),
        ("twice", "two terms of one antecedent"),
        ("weight", "not exactly one unweighted term"),
    ],
)
def test_systems_beyond_zero_order_tsk_are_refused(fault, message):
    with pytest.raises(ValueError, match=message):
        compile_control_system(small_system(fault), ["a", "b"], "y")


def test_names_and_points_are_checked(complete):
    system = to_control_system(complete)
    with pytest.raises(ValueError, match="no antecedent 'colour'"):
        compile_control_system(system, ["colour"], "execute_weight")
    with pytest.raises(ValueError, match="all must be listed"):
        compile_control_system(system, NAMES[:2], "execute_weight")
    with pytest.raises(ValueError, match="finite"):
        skfuzzy_bridge.evaluate(complete, np.full((1, 3), np.nan))
