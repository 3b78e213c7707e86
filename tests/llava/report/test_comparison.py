"""Promises of the paired comparison."""

from __future__ import annotations

import math

import pytest

from llava.report.comparison import paired_difference


def answers(*blocks: tuple[int, int]) -> dict[str, int]:
    """Answers of numbered questions from (value, how often) blocks."""
    values = [value for value, times in blocks for _ in range(times)]
    return {f"q{index}": value for index, value in enumerate(values)}


def test_interval_equals_the_one_computed_by_hand():
    # 98 questions: 60 right in both, 1 gained, 3 lost, 34 wrong in both.
    reference = answers((1, 60), (0, 1), (1, 3), (0, 34))
    run = answers((1, 60), (1, 1), (0, 3), (0, 34))
    found = paired_difference(reference, run)
    assert (found.num_items, found.num_gained, found.num_lost) == (98, 1, 3)
    assert found.difference == pytest.approx(-2 / 98)
    # b = 1.5, c = 3.5, m = 100: centre -2 / 100, variance (5 - 4 / 100) / 100^2 = 4.96e-4, deviation 0.0222711
    assert found.lower == pytest.approx(-0.02 - 1.959964 * 0.0222711, abs=1e-6)
    assert found.upper == pytest.approx(-0.02 + 1.959964 * 0.0222711, abs=1e-6)


def test_pairing_is_narrower_than_comparing_two_samples():
    reference = answers((1, 80), (0, 20))
    found = paired_difference(reference, answers((1, 78), (0, 22)))
    unpaired = 1.959964 * math.sqrt(0.8 * 0.2 / 100 + 0.78 * 0.22 / 100)
    assert found.upper - found.lower < unpaired


def test_equal_answers_leave_some_doubt():
    found = paired_difference(answers((1, 30)), answers((1, 30)))
    assert found.difference == 0 and found.lower == pytest.approx(-found.upper) and 0 < found.upper < 0.1


def test_exchanging_the_runs_turns_the_sign():
    first, second = answers((1, 5), (0, 4)), answers((0, 2), (1, 7))
    forth, back = paired_difference(first, second), paired_difference(second, first)
    assert (forth.difference, forth.lower, forth.upper) == pytest.approx((-back.difference, -back.upper, -back.lower))


def test_order_of_questions_does_not_matter():
    first, second = answers((1, 5), (0, 4)), answers((0, 2), (1, 7))
    assert paired_difference(first, dict(reversed(second.items()))) == paired_difference(first, second)


def test_interval_stays_within_its_range():
    found = paired_difference(answers((0, 2)), answers((1, 2)))
    assert found.difference == 1 and found.upper == 1


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match=r"1 of 2 questions of the reference are not in the run, the first is 'b'"):
        paired_difference({"a": 1, "b": 0}, {"a": 1})
    with pytest.raises(ValueError, match=r"1 of 2 questions of the run are not in the reference"):
        paired_difference({"a": 1}, {"a": 1, "b": 0})


def test_no_question_is_refused():
    with pytest.raises(ValueError, match="has a question to pair"):
        paired_difference({}, {})


def test_partial_credit_is_refused():
    with pytest.raises(ValueError, match=r"The run has 0.5 for 'a'; 0 \(wrong\) and 1 \(right\) are allowed"):
        paired_difference({"a": 1}, {"a": 0.5})
