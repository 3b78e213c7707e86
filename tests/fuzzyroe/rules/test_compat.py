"""The crisp router gives the numbers of the original published code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fuzzyroe.rules import compat, load_rule_base


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parents[2] / "golden" / "fuzzy_golden.npz")


def test_boxes_two_nearest_and_score_equal_the_original(golden):
    points = golden["grid/x"]
    np.testing.assert_array_equal(compat.match_box(points), golden["grid/match"])
    np.testing.assert_allclose(compat.interpolate_nearest_two(points), golden["grid/interp"], atol=1e-12)
    np.testing.assert_allclose(compat.published_score(points), golden["grid/f"], atol=1e-12)


def test_the_shipped_rules_are_the_original_ones_in_their_order(golden):
    table = load_rule_base("published_raw").table
    cells = np.argwhere(~np.isnan(table))
    np.testing.assert_array_equal(table[tuple(cells.T)], golden["rules/consequent"])
    np.testing.assert_array_equal(compat.BORDERS[cells], golden["rules/lo_hi"][..., 0])
    np.testing.assert_array_equal(compat.BORDERS[cells + 1], golden["rules/lo_hi"][..., 1])


@pytest.mark.parametrize("case", range(4))
def test_the_features_of_whole_tensors_give_the_original_keep_weights(golden, case):
    image, text, cosine = (golden[f"case{case}/x{index}"].astype(np.float64) for index in (1, 2, 3))
    weights = golden[f"case{case}/weight"]
    num_turns = text.shape[1]
    points = np.stack(np.broadcast_arrays(image, text, cosine[:, None]), axis=-1)
    scores = compat.published_score(points.reshape(-1, 3)).reshape(len(image), num_turns)
    np.testing.assert_allclose(weights[:, 1 : num_turns + 1, 0], scores, atol=1e-5)
