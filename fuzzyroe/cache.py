"""The key/value cache of kept rows, which is also where the decisions of a generation live."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from fuzzyroe.routing_state import RoutingState, RowSplit


class RoutedCacheLayer(DynamicLayer):
    """Cache of one layer that some rows skip: keys and values of the kept rows only, but the length of all.

    The attention mask and the position ids of *every* row are sized from layer 0, so a layer must count positions
    even where it stores none. ``keys`` and ``values`` are (num_kept, heads, N, head size), or None if no row is kept.

    Args:
        split: The rows that run the layer; valid while the layer is not empty.
        holds_all_rows: Whether the skipped rows have keys and values too, as where only the MLP is skipped; the layer
            then carries the decision, but stores what a stock one does.
    """

    keys: Any
    values: Any

    def __init__(self, split: RowSplit, holds_all_rows: bool = False) -> None:
        super().__init__()
        self.split = split
        self.holds_all_rows = holds_all_rows
        self.seen = 0

    @property
    def keep(self) -> Tensor:
        """True where the row runs the layer, (B,) bool on the CPU."""
        return self.split.keep

    def get_seq_length(self) -> int:
        """Give the number of positions seen, stored or not."""
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the states of the kept rows, each (num_kept, heads, N, head size), and give all states so far."""
        states = super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[-2]
        return states

    def advance(self, num_positions: int) -> None:
        """Count positions that every row skipped."""
        self.seen += num_positions

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions (the argument is zero or negative, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop got {tokens_to_remove}; allowed are 0 and negative numbers. Pass minus the number of positions "
                "to remove."
            )
        # nothing left means a new prompt, which is decided anew
        if self.seen + tokens_to_remove <= 0:
            self.reset()
        elif tokens_to_remove < 0:
            self.seen += tokens_to_remove
            if self.is_initialized:
                self.keys = self.keys[..., :tokens_to_remove, :]
                self.values = self.values[..., :tokens_to_remove, :]

    def reset(self) -> None:
        """Forget all positions, and with them the decision."""
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i become a copy of row ``beam_idx[i]``, which made the same decision, as beams of one prompt do.

        Nothing is moved to the host, since beams are reordered after every token.

        Args:
            beam_idx: Rows to copy, (B,) int64.

        Raises:
            IndexError: If a row would copy one of the other decision; ``batch_select_indices`` can.
        """
        if not self.is_initialized:
            return
        stored = beam_idx.to(self.keys.device)
        if not (self.holds_all_rows or self.split.all_kept):
            kept, skipped = self.split.rows(stored.device)
            slots = self.split.slots(stored.device)
            copies_kept_row = slots[stored[skipped]] < self.split.num_rows
            slots.new_zeros(1).index_select(0, copies_kept_row.long())  # only index 0 exists
            stored = slots[stored[kept]]
        self.keys, self.values = self.keys.index_select(0, stored), self.values.index_select(0, stored)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times in place."""
        self._take_rows(torch.arange(self.split.num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that ``indices`` names, a (B',) int64 or (B,) bool tensor, whatever their decisions."""
        self._take_rows(indices)

    def _take_rows(self, indices: Tensor) -> None:
        rows = torch.arange(self.split.num_rows)[indices.cpu()]
        keep = self.keep[rows]
        if self.is_initialized:
            slot_of_row = self.keep.cumsum(dim=0) - 1  # kept rows are stored densely, in order
            stored = (rows if self.holds_all_rows else slot_of_row[rows[keep]]).to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, stored), self.values.index_select(0, stored)
        self.split = RowSplit(keep)


def rows_to_run(
    past_key_values: Cache | None,
    layer: int,
    routing: RoutingState | None,
    num_rows: int,
    holds_all_rows: bool = False,
) -> RowSplit | None:
    """Give the rows that run a layer, and prepare its cache for them.

    A sequence is decided once, at its first positions: what a non-empty cache holds wins over ``routing``.

    Args:
        past_key_values: The cache of this forward pass; None without one.
        layer: Layer index.
        routing: State in hard mode; None leaves an undecided sequence dense.
        num_rows: Batch size B of this forward pass.
        holds_all_rows: Whether rows that skip have keys and values too (only the MLP is skipped).

    Returns:
        The rows, or None if nothing was decided and the base layer runs as it is.

    Raises:
        ValueError: If the cached decision is of another batch size.
        TypeError: If routing meets a cache that cannot hold kept rows only.
    """
    if past_key_values is None:
        return None if routing is None else routing.split(layer)
    cached: Any = past_key_values.layers[layer] if layer < len(past_key_values.layers) else None
    is_routed = isinstance(cached, RoutedCacheLayer)
    if is_routed and cached.seen > 0:
        if cached.split.num_rows != num_rows:
            raise ValueError(
                f"The cache holds decisions for {cached.split.num_rows} rows, but the batch has {num_rows}. Use the "
                "cache with the batch it was filled by, or reshape it with its batch_* methods."
            )
        return cached.split
    if routing is None:
        # an emptied cache must not hand the decision of its last prompt to the next one
        if is_routed:
            past_key_values.layers[layer] = DynamicLayer()
        return None
    refuse_unsupported(past_key_values)
    # the sequence began densely, and a layer that has all rows' keys goes on so
    if cached is not None and cached.get_seq_length() > 0:
        return None
    split = routing.split(layer)
    # where every row runs the stock cache layer will do, so a plan that skips nothing is the dense model bit for bit
    if not split.all_kept:
        while len(past_key_values.layers) <= layer:
            past_key_values.layers.append(DynamicLayer())
        past_key_values.layers[layer] = RoutedCacheLayer(split, holds_all_rows)
    elif is_routed:
        past_key_values.layers[layer] = DynamicLayer()
    return split


def empty_cache(num_layers: int) -> Cache:
    """Make a cache of dynamic layers."""
    return Cache(layers=[DynamicLayer() for _ in range(num_layers)])


def replace_rows(past_key_values: Cache, layer: int, rows: Tensor, resumed: Any) -> None:
    """Put what a resumed pass stored for some rows in the place of what the first pass did.

    Args:
        past_key_values: The cache of all rows; its layer is replaced, decision included.
        layer: Layer index.
        rows: Rows that were resumed, (E,) int64 on the CPU.
        resumed: Layer of their own cache, of E rows.
    """
    old: Any = past_key_values.layers[layer]
    routed = [part for part in (old, resumed) if isinstance(part, RoutedCacheLayer)]
    holds_all_rows = any(part.holds_all_rows for part in routed)
    num_rows = old.split.num_rows if isinstance(old, RoutedCacheLayer) else old.keys.shape[0]
    keep = old.keep.clone() if isinstance(old, RoutedCacheLayer) else torch.ones(num_rows, dtype=torch.bool)
    num_stored = old.keys.shape[0] if old.is_initialized else 0
    # where each row's keys stand in those of both passes, one after the other
    slots = torch.arange(num_rows) if holds_all_rows else keep.cumsum(dim=0) - 1
    keep[rows] = resumed.keep if isinstance(resumed, RoutedCacheLayer) else True
    slots[rows] = num_stored + (torch.arange(len(rows)) if holds_all_rows else keep[rows].cumsum(dim=0) - 1)
    stored = slots if holds_all_rows else slots[keep]
    fresh = DynamicLayer() if keep.all() else RoutedCacheLayer(RowSplit(keep), holds_all_rows)
    if isinstance(fresh, RoutedCacheLayer):
        fresh.seen = old.get_seq_length()
    parts = [part for part in (old, resumed) if part.is_initialized]
    if len(stored):
        index = stored.to(parts[0].keys.device)
        keys, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("keys", "values"))
        fresh.lazy_initialization(keys, values)
        fresh.keys, fresh.values = keys.index_select(0, index), values.index_select(0, index)
    past_key_values.layers[layer] = fresh


def prefill_runs(past_key_values: Any, num_rows: int) -> Tensor:
    """Read from a cache how often each row ran each layer in its prefill, reruns included, (B, L) int64 on the CPU.

    Args:
        past_key_values: As for ``kept_layers``.
        num_rows: Rows of that batch.
    """
    record = getattr(past_key_values, "escalation", None)
    return kept_layers(past_key_values, num_rows).long() if record is None else record.runs


def advance(past_key_values: Any, layer: int, num_positions: int) -> None:
    """Count positions at a layer that every row skips; without a cache there is nothing to count."""
    if past_key_values is not None:
        past_key_values.layers[layer].advance(num_positions)


def has_started(past_key_values: Cache | None) -> bool:
    """Say whether the cache holds positions already, so that decisions are taken."""
    return past_key_values is not None and past_key_values.get_seq_length() > 0


def kept_layers(past_key_values: Cache, num_rows: int) -> Tensor:
    """Read the decisions of a generation from its cache.

    Args:
        past_key_values: A cache that routed layers filled, e.g. ``generate(...).past_key_values``.
        num_rows: Rows of that batch (examples times beams).

    Returns:
        True where the row ran the layer, False where it skipped it, (B, L) bool on the CPU.
    """
    everyone = torch.ones(num_rows, dtype=torch.bool)
    return torch.stack(
        [layer.keep if isinstance(layer, RoutedCacheLayer) else everyone for layer in past_key_values.layers], dim=1
    )


def refuse_unsupported(past_key_values: Cache | None) -> None:
    """Raise TypeError if a cache cannot hold the kept rows only (static, sliding, quantized or offloaded)."""
    if past_key_values is None:
        return
    found = {type(layer) for layer in past_key_values.layers} - {DynamicLayer, RoutedCacheLayer}
    if found or past_key_values.offloading:
        names = ", ".join(sorted(kind.__name__ for kind in found)) or "offloading"
        raise TypeError(
            f"Hard routing found a {type(past_key_values).__name__} with {names}; it needs a DynamicCache of plain "
            "dynamic layers. Drop `cache_implementation`, or switch routing off."
        )


def remember_prompt(past_key_values: Any, attention_mask: Tensor | None) -> None:
    """Note on the cache which mask its decisions were taken under, for ``refuse_chunked_prefill``."""
    if past_key_values is not None:
        past_key_values.routing_prompt_mask = attention_mask
        past_key_values.escalation = None  # that of an earlier prompt, in a cache that was emptied


def refuse_chunked_prefill(past_key_values: Any, attention_mask: Tensor | None, num_positions: int) -> None:
    """Raise ValueError if a router decided on a first chunk of the prompt and another chunk follows.

    ``generate(prefill_chunk_size=...)`` feeds growing slices of one mask; speculation or a next turn come with a mask
    of their own. So a longer mask in the same memory is a chunk, unless it brings one position only: then it may be
    a hand-written decoding loop.

    Args:
        past_key_values: The non-empty cache.
        attention_mask: Mask of this forward pass, (B, N).
        num_positions: Positions that this forward pass adds.
    """
    first = getattr(past_key_values, "routing_prompt_mask", None)
    if first is None or attention_mask is None or num_positions < 2 or attention_mask.shape[-1] <= first.shape[-1]:
        return
    if attention_mask.untyped_storage().data_ptr() == first.untyped_storage().data_ptr():
        raise ValueError(
            f"The prompt arrives in chunks, the first of {first.shape[-1]} positions; the router must see all of it at "
            "once. Unset `prefill_chunk_size`, or give forced keep weights as `routing`."
        )
