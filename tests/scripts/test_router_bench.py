"""The router bench compares with what it says it compares with, and names what misses its bar."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fuzzyroe.rules import compat, load_rule_base


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("bench/router.py")


def test_the_loop_is_the_published_router(bench) -> None:
    table = load_rule_base("published_raw").table
    rules = [(cell, float(table[cell])) for cell in map(tuple, np.argwhere(~np.isnan(table)).tolist())]
    points = np.random.default_rng(0).random((200, 3))
    np.testing.assert_allclose(bench.published_loop(points.tolist(), rules), compat.published_score(points), atol=1e-12)


def test_exactness_recovery_and_completion_meet_their_bars(bench) -> None:
    lines = [*bench.firing_error(500), *bench.recover(30), *bench.completion(40)]
    assert [line.name for line in lines if not line.is_met] == []
    assert sum(line.bar is not None for line in lines) >= 8


def test_a_missed_bar_is_named_with_exit_status_one(bench, monkeypatch, tmp_path, capsys) -> None:
    slow = bench.Line("slow thing", np.float64(7.0), 5.0, " %")
    lines = [slow, bench.Line("quick thing", 1.0, 5.0), bench.Line("other", 9.0)]
    monkeypatch.setattr(bench, "measure", lambda quick: lines)
    monkeypatch.setattr(sys, "argv", ["router.py", "--check", "--json", str(tmp_path / "numbers.json")])
    with pytest.raises(SystemExit, match="slow thing") as stopped:
        bench.main()
    assert "quick thing" not in str(stopped.value)
    assert "NOT MET" in capsys.readouterr().out and '"met": false' in (tmp_path / "numbers.json").read_text()
