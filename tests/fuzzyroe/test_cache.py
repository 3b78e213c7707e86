"""Promises of the cache of kept rows."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from fuzzyroe.cache import RoutedCacheLayer, kept_layers, refuse_unsupported, rows_to_run
from fuzzyroe.routing_state import RoutingState, RowSplit

KEEP = torch.tensor([True, False, True, True])


def filled_layer(keep=KEEP, num_positions=3):
    """A layer whose stored keys say which row they are of."""
    layer = RoutedCacheLayer(RowSplit(keep))
    rows = keep.nonzero().flatten()
    if len(rows) == 0:
        layer.advance(num_positions)
    else:
        states = rows.float().view(-1, 1, 1, 1).expand(-1, 2, num_positions, 5).contiguous()
        layer.update(states, states + 10)
    return layer


def stored_rows(layer):
    return [] if layer.keys is None else layer.keys[:, 0, 0, 0].int().tolist()


@pytest.mark.parametrize("keep", [KEEP, torch.zeros(4, dtype=torch.bool)])
def test_length_and_mask_sizes_count_positions_that_are_not_stored(keep):
    layer = filled_layer(keep)
    assert layer.get_seq_length() == 3
    assert layer.get_mask_sizes(2) == (5, 0)
    assert layer.get_max_length() == -1


@pytest.mark.parametrize(
    "indices",
    [torch.tensor([1, 1, 0, 3]), torch.tensor([3, 2]), torch.tensor([1, 1]), torch.tensor([1, 0, 1, 1]).bool()],
)
def test_selected_rows_bring_their_decision_along(indices):
    layer = filled_layer()
    layer.batch_select_indices(indices)
    rows = torch.arange(4)[indices]
    assert torch.equal(layer.keep, KEEP[rows])
    assert stored_rows(layer) == rows[KEEP[rows]].tolist()
    assert layer.values.shape == layer.keys.shape and layer.get_seq_length() == 3


def test_beams_are_repeated_and_reordered_with_their_decision():
    layer = filled_layer()
    layer.batch_repeat_interleave(2)
    expected = [True, True, False, False, True, True, True, True]
    assert layer.keep.tolist() == expected and stored_rows(layer) == [0, 0, 2, 2, 3, 3]
    layer.keys[1] += 50  # the second beam of row 0
    layer.reorder_cache(torch.tensor([1, 1, 3, 2, 5, 4, 7, 6]))
    assert layer.keep.tolist() == expected and stored_rows(layer) == [50, 50, 2, 2, 3, 3]


@pytest.mark.parametrize("beams", [[1, 1, 2, 3], [0, 0, 2, 3]])
def test_a_row_cannot_become_one_of_the_other_decision(beams):
    with pytest.raises(IndexError):
        filled_layer().reorder_cache(torch.tensor(beams))


def test_a_layer_that_holds_all_rows_stores_what_a_stock_one_does():
    layer, stock = RoutedCacheLayer(RowSplit(KEEP), holds_all_rows=True), DynamicLayer()
    states = torch.arange(4.0).view(-1, 1, 1, 1).expand(4, 2, 3, 5).contiguous()
    for cache in (layer, stock):
        cache.update(states, states + 10)
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0, 2, 2, 5, 4, 7, 7]))
        cache.batch_select_indices(torch.tensor([6, 2, 3]))
    assert layer.keep.tolist() == [True, False, False] and layer.get_seq_length() == 2
    assert torch.equal(layer.keys, stock.keys) and torch.equal(layer.values, stock.values)


@pytest.mark.parametrize("value", [True, False])
def test_uniform_decisions_survive_every_selection(value):
    layer = filled_layer(torch.full((4,), value))
    layer.reorder_cache(torch.tensor([3, 1, 1, 0]))
    assert stored_rows(layer) == ([3, 1, 1, 0] if value else [])
    layer.batch_repeat_interleave(3)
    layer.batch_select_indices(torch.tensor([0, 5]))
    layer.batch_select_indices(torch.tensor([True, False]))
    assert layer.keep.tolist() == [value] and layer.get_seq_length() == 3


@pytest.mark.parametrize("keep", [KEEP, torch.zeros(4, dtype=torch.bool)])
def test_crop_forgets_positions_and_reset_the_decision(keep):
    layer = filled_layer(keep)
    layer.crop(0)
    layer.crop(-2)
    assert layer.get_seq_length() == 1
    assert layer.keys is None or layer.keys.shape[-2] == 1
    with pytest.raises(ValueError, match="0 and negative"):
        layer.crop(1)
    layer.crop(-5)
    assert layer.get_seq_length() == 0 and layer.keys is None and not layer.is_initialized


def test_decisions_are_read_back_from_a_cache():
    cache = DynamicCache()
    cache.layers = [RoutedCacheLayer(RowSplit(KEEP)), DynamicLayer()]
    assert torch.equal(kept_layers(cache, 4), torch.stack([KEEP, torch.ones(4).bool()], dim=1))


def test_a_sequence_is_decided_once():
    keep = KEEP.unsqueeze(1)
    cache = DynamicCache()
    split = rows_to_run(cache, 0, RoutingState.from_batch({"attention_mask": torch.ones(4, 3)}).forced(keep), 4)
    assert torch.equal(split.keep, KEEP)
    cache.layers[0] = filled_layer()
    assert torch.equal(
        rows_to_run(cache, 0, RoutingState.from_batch({"attention_mask": torch.ones(4, 3)}).forced(~keep), 4).keep, KEEP
    )
    with pytest.raises(ValueError, match="decisions for 4 rows, but the batch has 2"):
        rows_to_run(cache, 0, None, 2)
    cache.reset()
    assert rows_to_run(cache, 0, None, 4) is None
    assert type(cache.layers[0]) is DynamicLayer


def test_caches_that_need_all_rows_are_refused(tiny_llama):
    with pytest.raises(TypeError, match="StaticCache with StaticLayer"):
        refuse_unsupported(StaticCache(config=tiny_llama.config, max_cache_len=16))
    refuse_unsupported(DynamicCache())
    refuse_unsupported(None)
