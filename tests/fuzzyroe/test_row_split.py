"""Promises of the split of rows."""

import pytest
import torch

from fuzzyroe.routing_state import RowSplit


@pytest.mark.parametrize(
    ("keep", "all_kept", "none_kept"), [([1, 1], True, False), ([0, 0], False, True), ([0, 1, 1], False, False)]
)
def test_flags_count_the_kept_rows(keep, all_kept, none_kept):
    split = RowSplit(torch.tensor(keep, dtype=torch.bool))
    assert (split.num_rows, split.num_kept) == (len(keep), sum(keep))
    assert (split.all_kept, split.none_kept) == (all_kept, none_kept)


def test_row_indices_are_made_once_per_device():
    split = RowSplit(torch.tensor([False, True, True, False]))
    kept, skipped = split.rows(torch.device("cpu"))
    assert kept.tolist() == [1, 2] and skipped.tolist() == [0, 3]
    assert split.rows(torch.device("cpu"))[0] is kept
