"""The escalation bench compares what it says it compares."""

from __future__ import annotations

import pytest

from fuzzyroe import set_escalation
from fuzzyroe.resume import ALL_LAYERS, KEEP_PLAN
from fuzzyroe.routers import KeepAllRouter
from scripts.bench.escalation import BATCHES, SHARE, FirstRows, make_plan, measure_batch, net_skip_rate
from scripts.bench.speed.decoders import Bench, Shape


def test_the_plan_skips_thirty_percent_net_and_a_fifth_of_the_rows_is_escalated() -> None:
    keep = make_plan(16)
    assert (~keep).nonzero().flatten().tolist() == [5, 7, 9, 11, 13, 14, 15]
    assert net_skip_rate(keep) == pytest.approx(0.3)
    for batch, shares in BATCHES.items():
        assert sum(shares.values()) == pytest.approx(1)
        assert sum(count * share for count, share in shares.items()) == pytest.approx(SHARE * batch)


@pytest.mark.parametrize("batch", list(BATCHES))
def test_every_number_is_measured(batch) -> None:
    bench = Bench(Shape("tiny", 64, 8, 4, 2, 96, 100), KeepAllRouter(8))
    lines = list(measure_batch(bench, batch, length=24, repeats=2, most=1e9))
    assert all(line.value > 0 for line in lines) and lines[0].at_most == 1e9
    count = max(BATCHES[batch])
    set_escalation(bench.routed, FirstRows.make("fuzzy", count=count))
    levels = bench.prefill(bench.planned(make_plan(8).expand(batch, -1)), batch, 24).escalation.levels
    assert levels.tolist() == [ALL_LAYERS] * count + [KEEP_PLAN] * (batch - count)
