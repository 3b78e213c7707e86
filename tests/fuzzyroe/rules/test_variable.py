"""Partitions sum to one, peak at their peaks, and follow quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzyroe.rules import LinguisticVariable
from fuzzyroe.rules.variable import MIN_SPACING

TERMS = ("low", "medium", "high")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(2, 7))
def test_quantile_peaks_are_apart_inside_and_memberships_sum_to_one(samples, num_terms):
    terms = [f"term_{k}" for k in range(num_terms)]
    variable = LinguisticVariable.from_quantiles("x", np.array(samples), terms)
    assert np.diff(variable.peaks).min() >= MIN_SPACING * (1 - 1e-9)
    assert 0 <= variable.peaks[0] and variable.peaks[-1] <= 1
    memberships = variable.memberships(np.linspace(-1, 2, 50))
    np.testing.assert_allclose(memberships.sum(axis=-1), 1, atol=1e-15)
    assert memberships.min() >= 0


def test_membership_is_one_at_the_own_peak_and_beyond_the_outer_ones():
    variable = LinguisticVariable("x", (0, 1), TERMS, (0.2, 0.5, 0.9))
    np.testing.assert_array_equal(variable.memberships(np.array(variable.peaks)), np.eye(3))
    np.testing.assert_array_equal(variable.memberships(np.array([-5.0, 5.0])), np.eye(3)[[0, 2]])


def test_quantile_peaks_give_every_term_the_same_mean_membership():
    samples = np.random.default_rng(0).beta(2, 5, 20_000)
    variable = LinguisticVariable.from_quantiles("x", samples)
    np.testing.assert_allclose(variable.peaks, np.quantile(samples, [1 / 6, 1 / 2, 5 / 6]))
    assert np.abs(variable.memberships(samples).mean(axis=0) - 1 / 3).max() < 0.05


def test_a_constant_feature_gets_spread_peaks_and_a_warning(caplog):
    variable = LinguisticVariable.from_quantiles("x", np.ones(10))
    np.testing.assert_allclose(variable.peaks, (0.998, 0.999, 1.0))
    assert "nearly constant" in caplog.text


@pytest.mark.parametrize("samples", [[], [np.nan, 0.5], [0.1, 1.5]])
def test_unusable_samples_are_refused(samples):
    with pytest.raises(ValueError, match="are allowed; remove or rescale"):
        LinguisticVariable.from_quantiles("x", np.array(samples))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "two words"}, "not an identifier"),
        ({"universe": (1, 0)}, "lower < upper"),
        ({"terms": ("low", "low", "high")}, "different names"),
        ({"terms": ("low", "any", "high")}, "reserved"),
        ({"peaks": (0, 0.5)}, "one finite number per term"),
        ({"peaks": (0, 0.7, 0.6)}, "peaks increase by at least"),
        ({"peaks": (0, 0.5, 0.5001)}, "peaks increase by at least"),
        ({"peaks": (0, 0.5, 1.1)}, "inside the universe"),
        ({"monotone": "up"}, "'increasing', 'decreasing'"),
    ],
)
def test_a_wrong_variable_is_refused(change, message):
    fields = {"name": "x", "universe": (0, 1), "terms": TERMS, "peaks": (0, 0.5, 1)} | change
    with pytest.raises(ValueError, match=message):
        LinguisticVariable(**fields)
