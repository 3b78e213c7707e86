"""Promises of the search for a table of budgets: it reaches both ends, is dense where rates move, and increases."""

from __future__ import annotations

import math

import pytest

from fuzzyroe.routers import LinearRouter
from fuzzyroe.routers.roe.router import LOWEST_RATE, search_skip_logit_biases


def sigmoid_at(centre: float, width: float):
    """Skip rates of logits around a centre."""
    return lambda offset: 1 / (1 + math.exp(-(offset - centre) / width))


@pytest.mark.parametrize(("centre", "width"), [(0.0, 1.0), (3.0, 0.2), (-5.0, 2.0), (40.0, 5.0)])
def test_any_rate_up_to_the_largest_is_met_by_interpolation(centre: float, width: float) -> None:
    rate_at = sigmoid_at(centre, width)
    router = LinearRouter(2, 8, bias_table=search_skip_logit_biases(rate_at, 0.5, 24))
    assert router.bias_table[0][0] <= LOWEST_RATE and router.max_skip_ratio >= 0.5
    for wanted in (0.1, 0.2, 0.3, 0.45):
        router.set_skip_rate(wanted)
        assert rate_at(router.skip_logit_bias) == pytest.approx(wanted, abs=0.04)


def test_points_that_contradict_the_order_are_left_out() -> None:
    table = search_skip_logit_biases(
        lambda offset: min(1.0, max(0.0, 0.3 * offset + 0.2 * math.sin(40 * offset) + 0.3)), 0.5
    )
    rates, offsets = zip(*table, strict=True)
    assert list(rates) == sorted(set(rates)) and list(offsets) == sorted(set(offsets))


def test_a_jump_is_found_to_a_small_number() -> None:
    table = search_skip_logit_biases(lambda offset: 0.05 if offset < -3 else 0.2 if offset < 0.86 else 0.5, 0.5, 20)
    above = next(offset for rate, offset in table if rate == 0.5)
    assert 0.86 <= above < 0.88


def test_numbers_are_measured_once_and_no_more_than_asked() -> None:
    asked = []

    def rate_at(offset: float) -> float:
        asked.append(offset)
        return sigmoid_at(1.0, 1.0)(offset)

    search_skip_logit_biases(rate_at, 0.5, 14)
    assert len(asked) == len(set(asked)) == 14


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_rate is 1\.0; a rate in \(0, 1\)"):
        search_skip_logit_biases(lambda offset: 0.5, 1.0)
    with pytest.raises(ValueError, match=r"skips 0\.200 of the layers, 0\.5 is wanted"):
        search_skip_logit_biases(lambda offset: 0.2, 0.5)
