"""Fitting solves its program within its constraints and beats prior and least squares; projection restores order."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from fuzzyroe.rules import effective_examples, fit_consequents
from fuzzyroe.rules.fitting import order_edges, project_missing, solve_quadratic_program

EDGES = order_edges((3, 3), (1, 1))


def small_problem(seed, count=30):
    rng = np.random.default_rng(seed)
    firing = rng.dirichlet(np.full(9, 0.3), count)
    return firing, rng.normal(0.5, 0.6, count), np.sort(rng.random(9))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 0.1]))
def test_the_fit_minimises_its_objective_under_its_constraints(seed, max_change):
    firing, targets, prior = small_problem(seed)

    def objective(values):
        return np.square(firing @ values - targets).sum() + 2 * np.square(values - prior).sum()

    fitted = fit_consequents(firing, targets, prior, prior_strength=2.0, edges=EDGES, max_change=max_change)
    assert fitted.min() >= 0 and fitted.max() <= 1
    assert (fitted[EDGES[:, 0]] <= fitted[EDGES[:, 1]] + 1e-9).all()
    change = np.inf if max_change is None else max_change
    assert np.abs(fitted - prior).max() <= change + 1e-12
    box = list(zip(np.maximum(0, prior - change), np.minimum(1, prior + change), strict=True))
    order = {"type": "ineq", "fun": lambda values: values[EDGES[:, 1]] - values[EDGES[:, 0]]}
    reference = minimize(objective, prior, bounds=box, constraints=[order], options={"ftol": 1e-12, "maxiter": 500})
    assert objective(fitted) <= reference.fun + 1e-7


def test_without_active_constraints_the_fit_is_ridge_to_the_prior():
    firing, targets, prior = small_problem(1)
    strengths = np.linspace(1, 9, 9)
    fitted = fit_consequents(firing, targets, prior, prior_strength=strengths, lower=-9, upper=9)
    ridge = np.linalg.solve(firing.T @ firing + np.diag(strengths), firing.T @ targets + strengths * prior)
    np.testing.assert_allclose(fitted, ridge, atol=1e-12)


def test_rules_without_examples_keep_their_prior():
    firing = np.zeros((5, 9))
    firing[:, 0] = 1
    prior = np.linspace(0.1, 0.9, 9)
    fitted = fit_consequents(firing, np.full(5, 0.05), prior, edges=EDGES)
    np.testing.assert_allclose(fitted[1:], prior[1:])
    assert fitted[0] == pytest.approx((5 * 0.05 + 8 * 0.1) / 13)


def test_weaker_priors_move_further(complete):
    features = np.random.default_rng(0).random((100, 3))
    fitted = complete.fit(features, np.full(100, 0.9), monotone=False)
    change = np.abs(fitted.table - complete.table) / np.abs(0.9 - complete.table)
    assert change[complete.source == "interpolated"].mean() > 2 * change[complete.source == "expert"].mean()


def test_recovery_simulation_ridge_beats_prior_and_least_squares(complete):
    rng, errors = np.random.default_rng(0), {"prior": [], "least squares": [], "fit": []}
    test_points = rng.random((500, 3))
    for _ in range(4):
        noisy = np.clip(complete.table + 0.1 * rng.standard_normal((3, 3, 3)), 0, 1)
        truth = project_missing(noisy, np.zeros((3, 3, 3), dtype=bool), (1, 1, 1))
        features = rng.random((150, 3))
        firing = complete.firing_strengths(features)
        targets = firing @ truth.ravel() + 0.2 * rng.standard_normal(150)
        fitted = complete.fit(features, targets, prior_strength=8.0)
        assert fitted.monotonicity_violations(0.0) == []
        tables = {"prior": complete.table.ravel(), "fit": fitted.table.ravel()}
        tables["least squares"] = np.linalg.lstsq(firing, targets, rcond=None)[0]
        for name, table in tables.items():
            difference = complete.firing_strengths(test_points) @ (table - truth.ravel())
            errors[name].append(np.sqrt(np.mean(difference**2)))
    means = {name: np.mean(values) for name, values in errors.items()}
    assert means["fit"] < means["prior"] and means["fit"] < means["least squares"] and means["fit"] < 0.06


def test_five_hundred_examples_are_fitted_within_a_second(complete):
    rng = np.random.default_rng(0)
    features, targets = rng.random((500, 3)), rng.standard_normal(500)
    start = time.process_time()
    complete.fit(features, targets, max_change=0.15)
    assert time.process_time() - start < 1


def test_fitting_again_starts_from_the_prior(complete):
    rng = np.random.default_rng(0)
    features, targets = rng.random((50, 3)), rng.random(50)
    once = complete.fit(features, targets)
    assert once.fit(features, targets) == once
    assert once.unfitted().table.tolist() == complete.table.tolist() and (once.source == "fitted").all()
    assert once.provenance["fit"]["examples"] == 50


def test_the_report_says_what_became_of_each_rule(complete):
    rng = np.random.default_rng(0)
    features = rng.random((50, 3))
    fitted = complete.fit(features, rng.random(50))
    report = fitted.report(features)
    assert [entry.terms for entry in report[:2]] == [("low", "low", "low"), ("low", "low", "medium")]
    assert report[0].expert == 0 and report[0].interpolated is None
    assert report[1].expert is None and report[1].interpolated == pytest.approx(0.111)
    for entry, value in zip(report, fitted.output_table.ravel(), strict=True):
        assert entry.fitted == value
        assert entry.change == pytest.approx(value - (entry.interpolated if entry.expert is None else entry.expert))
    counts = effective_examples(fitted.firing_strengths(features))
    np.testing.assert_array_equal([entry.effective_examples for entry in report], counts)


def test_contradicting_constraints_are_refused():
    firing, targets, _ = small_problem(0)
    with pytest.raises(ValueError, match="raise max_change, or give up monotone"):
        fit_consequents(firing, targets, np.linspace(1, 0, 9), edges=EDGES, max_change=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.zeros(3)}, "pass one target per example"),
        ({"targets": np.full(30, np.nan)}, "targets holds 30 non-finite"),
        ({"prior": np.full(9, np.nan)}, "interpolate the rule base first"),
        ({"prior_strength": 0.0}, "finite numbers above 0"),
        ({"max_change": -1.0}, "0 or more is allowed"),
    ],
)
def test_unusable_examples_are_refused(change, message):
    firing, targets, prior = small_problem(0)
    with pytest.raises(ValueError, match=message):
        fit_consequents(**({"firing": firing, "targets": targets, "prior": prior} | change))


@pytest.mark.parametrize("size", [1e-16, 1e-9, 1.0])
def test_contradictions_of_any_size_leave_a_completion(size):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        table = 0.5 + size * rng.uniform(-0.4, 0.4, (3, 3, 3))  # all equal but for the noise
        given_cells = rng.random(table.shape) < 0.6
        completed = project_missing(table, given_cells, (1, 1, 1))
        np.testing.assert_array_equal(completed[given_cells], table[given_cells])
        free = np.where(given_cells, np.nan, completed)
        for axis in range(3):
            assert not (np.diff(free, axis=axis) < -1e-9).any()  # missing neighbours end up in order


def test_tables_with_ties_are_projected_though_nnls_stops_early():
    nothing, num_projected = np.zeros((3, 3, 3), dtype=bool), 0
    for seed in (84, 917):  # scipy's nnls calls these contradictory
        rng = np.random.default_rng(seed)
        truth = project_missing(rng.random((3, 3, 3)), nothing, (1, 1, 1))
        given_cells, noise = rng.random((3, 3, 3)) < 0.6, rng.random((3, 3, 3))
        table = np.where(given_cells, truth, np.where(noise < 0.5, truth[given_cells].min(), noise))
        completed = project_missing(table, given_cells, (1, 1, 1))
        np.testing.assert_array_equal(completed[given_cells], truth[given_cells])
        assert all((np.diff(completed, axis=axis) > -1e-9).all() for axis in range(3))
        num_projected += (completed != table).any()
    assert num_projected == 2


def test_constraints_that_nothing_fulfils_are_refused():
    with pytest.raises(ValueError, match="contradict each other"):
        solve_quadratic_program(np.eye(1), np.zeros(1), np.array([[1.0], [-1.0]]), np.array([1.0, 0.0]))
