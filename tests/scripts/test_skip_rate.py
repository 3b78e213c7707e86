"""The skip rate script reports what a router really skips."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fuzzyroe.budget import allocate
from fuzzyroe.routers.fuzzy import FuzzyRouter
from fuzzyroe.rules import load_rule_base


def test_met_rates_are_those_of_the_router_also_where_it_misses(load_script) -> None:
    script = load_script("playground/skip_rate.py")
    router = FuzzyRouter(load_rule_base("default"), 8)
    losses = np.random.default_rng(0).exponential(size=(80, 4)).cumsum(axis=1)
    losses *= np.linspace(1, 6, 80)[:, None]  # a higher score, a larger loss
    router.set_budget_table(allocate(losses, (np.arange(80) + 0.5) / 80, [5, 2, 7], 8))
    raw = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    router.score_quantiles.copy_(router.rules(raw).quantile(torch.linspace(0, 1, len(router.score_quantiles))))
    rows = script.met_rates(router, raw)
    assert [rate for rate, _ in rows] == pytest.approx([0.05 * step for step in range(1, 8)])  # up to 3 of 8
    assert [met for _, met in rows] == pytest.approx([rate for rate, _ in rows], abs=script.TOLERANCE)
    easy = script.met_rates(router, raw / 2)
    assert all(met > rate + script.TOLERANCE for rate, met in easy[:4])
