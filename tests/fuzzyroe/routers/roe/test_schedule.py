"""Promises of RoE's schedule: the published one, exact at every step of any run, a function of progress alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzzyroe.routers.roe.training import (
    OURS,
    PHASES,
    PUBLISHED,
    Relaxation,
    bias,
    phase,
    relax,
    run_progress,
    start_bias,
    temperature,
)
from golden_roe import BOUND, arrays

NUMBERS = {0: "random", 1: "annealed", 2: "free"}
LENGTHS = sorted(int(key[1:].split("/")[0]) for key in arrays("schedule_golden") if key.endswith("/stage"))


def whole_run(num_steps: int, compat) -> list[tuple[str, float, float]]:
    """Phase, temperature and bias of every step, at a skip ratio of 0.3."""
    progress = [run_progress(step, num_steps, compat) for step in range(num_steps)]
    return [(phase(p), temperature(p), bias(p, 0.3)) for p in progress]


def test_golden_runs_of_several_lengths_are_there() -> None:
    assert LENGTHS == [200, 399, 1000, 4000]


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_every_step_is_the_published_one(num_steps: int) -> None:
    published = {name: arrays("schedule_golden")[f"n{num_steps}/{name}"] for name in ("stage", "temp", "bias")}
    for step, (name, found_temperature, found_bias) in enumerate(whole_run(num_steps, PUBLISHED)):
        assert name == NUMBERS[int(published["stage"][step])], step
        assert found_bias == pytest.approx(published["bias"][step], abs=BOUND)
        if name != "random":  # while decisions are drawn the published temperature stands at 10 unused
            assert found_temperature == pytest.approx(published["temp"][step], abs=BOUND), step


@pytest.mark.parametrize("num_steps", [200, 1000, 4000])
def test_where_units_are_whole_ours_is_the_published_schedule(num_steps: int) -> None:
    assert whole_run(num_steps, OURS) == whole_run(num_steps, PUBLISHED)


def test_in_a_run_without_whole_units_ours_keeps_its_shares_and_the_published_one_does_not() -> None:
    ours, published = ([name for name, *_ in whole_run(399, compat)] for compat in (OURS, PUBLISHED))
    assert [ours.index(name) for name in PHASES] == [0, 120, 200]
    assert [published.index(name) for name in PHASES] == [0, 60, 100]


def test_whole_units_need_two_hundred_steps() -> None:
    with pytest.raises(ValueError, match="199 steps has no whole unit.*at least 200 steps"):
        run_progress(3, 199, PUBLISHED)
    assert run_progress(3, 6, OURS) == 0.5


def test_the_values_that_the_table_of_the_module_promises() -> None:
    assert [(temperature(p), bias(p, 0.3)) for p in (0.0, 0.29)] == [(0.001, start_bias(0.3))] * 2
    assert temperature(0.3) == pytest.approx(9.5) and bias(0.3, 0.3) == pytest.approx(0.85 * start_bias(0.3))
    assert temperature(0.4999) == pytest.approx(1.285, abs=1e-3) and bias(0.4999, 0.3) < 4e-4
    assert temperature(0.5) == pytest.approx(1.2209, abs=1e-4) and bias(0.5, 0.3) == 0
    assert temperature(0.9999) == pytest.approx(7.6e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("rate", "expected"), [(0.0, 1.0), (0.1, 0.55279), (0.2, 0.36754), (0.3, 0.22540), (0.4, 0.10557), (0.5, 0.0)]
)
def test_the_start_bias_is_the_published_table_and_its_closed_form(rate: float, expected: float) -> None:
    assert start_bias(rate) == pytest.approx(expected, abs=1e-5)


@given(st.floats(0, 0.5))
def test_the_start_bias_gives_the_rate_it_is_asked_for(rate: float) -> None:
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    # v > u + b for a share of max(0, 1 - u - b) of all v
    assert float((1 - grid - start_bias(rate)).clamp(min=0).mean()) == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize("rate", [-0.01, 0.51, float("nan")])
def test_a_rate_that_no_bias_reaches_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="outside \\[0, 0.5\\]"):
        start_bias(rate)


@given(st.integers(1, 3000), st.data())
def test_a_resumed_run_computes_what_an_uninterrupted_one_does(num_steps: int, data) -> None:
    stop = data.draw(st.integers(0, num_steps - 1))
    resumed = [run_progress(step, num_steps) for step in range(stop, num_steps)]
    assert [(phase(p), temperature(p), bias(p, 0.2)) for p in resumed] == [
        (phase(p), temperature(p), bias(p, 0.2)) for p in [run_progress(s, num_steps) for s in range(num_steps)][stop:]
    ]
    temperatures = [temperature(p) for p in resumed if phase(p) != "random"]
    assert temperatures == sorted(temperatures, reverse=True)


def test_draws_belong_to_the_random_phase_and_only_there() -> None:
    draws = torch.rand(4, 1, 2, 2)
    assert relax(0.1, 0.3, draws) == Relaxation(0.001, start_bias(0.3), draws)
    assert relax(0.7, 0.3) == Relaxation(temperature(0.7), 0.0, None)
    with pytest.raises(ValueError, match="random phase and was given no draws"):
        relax(0.1, 0.3)
    with pytest.raises(ValueError, match="free phase and was given draws"):
        relax(0.7, 0.3, draws)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_drawn_decisions_skip_at_the_rate_and_are_all_but_hard(rate: float) -> None:
    draws = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))
    relaxation = relax(0.0, rate, draws)
    logits = torch.stack([draws[:, 0] + relaxation.bias, draws[:, 1]], dim=-1)
    keep = (logits / relaxation.temperature).softmax(dim=-1)[:, 0]
    assert float(1 - keep.mean()) == pytest.approx(rate, abs=0.004)
    assert ((keep > 1e-3) & (keep < 1 - 1e-3)).float().mean() < 0.02
