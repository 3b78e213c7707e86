"""Tables are projected onto their declared order, whatever was given, and contradictions are named."""

from __future__ import annotations

import numpy as np
import pytest

from fuzzyroe.rules.monotone import project_missing, solve_quadratic_program


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
