"""The router bench compares with the published router as it was, and names what misses its bar."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("bench/router.py")


@pytest.fixture(scope="module")
def golden():
    """Numbers of the original published code."""
    return np.load(Path(__file__).parents[1] / "golden" / "fuzzy_golden.npz")


def test_boxes_two_nearest_and_score_equal_the_original(bench, golden) -> None:
    points, rules = golden["grid/x"].astype(np.float64).tolist(), bench.published_rules()
    matched = [bench.match_box(point, rules) for point in points]
    np.testing.assert_array_equal([np.nan if value is None else value for value in matched], golden["grid/match"])
    nearest = [bench.interpolate_nearest_two(point, rules) for point in points]
    np.testing.assert_allclose(nearest, golden["grid/interp"], atol=1e-12)
    np.testing.assert_allclose(bench.published_loop(points, rules), golden["grid/f"], atol=1e-12)


def test_the_shipped_rules_are_the_original_ones_in_their_order(bench, golden) -> None:
    cells, values = zip(*bench.published_rules(), strict=True)
    np.testing.assert_array_equal(values, golden["rules/consequent"])
    np.testing.assert_array_equal(np.take(bench.BORDERS, cells), golden["rules/lo_hi"][..., 0])
    np.testing.assert_array_equal(np.take(bench.BORDERS, np.add(cells, 1)), golden["rules/lo_hi"][..., 1])


@pytest.mark.parametrize("case", range(4))
def test_the_features_of_whole_tensors_give_the_original_keep_weights(bench, golden, case) -> None:
    image, text, cosine = (golden[f"case{case}/x{index}"].astype(np.float64) for index in (1, 2, 3))
    weights = golden[f"case{case}/weight"]
    num_turns = text.shape[1]
    points = np.stack(np.broadcast_arrays(image, text, cosine[:, None]), axis=-1).reshape(-1, 3)
    scores = np.reshape(bench.published_loop(points.tolist(), bench.published_rules()), (len(image), num_turns))
    np.testing.assert_allclose(weights[:, 1 : num_turns + 1, 0], scores, atol=1e-5)


def test_exactness_recovery_and_completion_meet_their_bars(bench) -> None:
    lines = [*bench.firing_error(500), *bench.recover(30), *bench.completion(40)]
    assert [line.name for line in lines if not line.is_met] == []
    assert sum(line.has_bar for line in lines) >= 8


def test_a_missed_bar_is_named_with_exit_status_one(bench, monkeypatch, tmp_path, capsys) -> None:
    slow = bench.Line("slow thing", np.float64(7.0), at_most=5.0, unit=" %")
    lines = [slow, bench.Line("quick thing", 1.0, at_most=5.0), bench.Line("other", 9.0)]
    monkeypatch.setattr(bench, "measure", lambda quick: lines)
    monkeypatch.setattr(sys, "argv", ["router.py", "--check", "--json", str(tmp_path / "numbers.json")])
    with pytest.raises(SystemExit, match="slow thing") as stopped:
        bench.main()
    assert "quick thing" not in str(stopped.value)
    assert "NOT MET" in capsys.readouterr().out and '"met": false' in (tmp_path / "numbers.json").read_text()
