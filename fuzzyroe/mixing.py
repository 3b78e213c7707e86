"""Putting together what a part of a decoder layer gives and what the skip branch gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.routing_state import RoutingState
from fuzzyroe.row_split import RowSplit

Run = Callable[..., Tensor]
"""The routed part: states (B, N, D), with the arguments they come with, to states of that shape."""

Mix = Callable[[Run, Callable[[Tensor], Tensor], Tensor, tuple, dict[str, Any]], Tensor]
"""``(run, skip, hidden_states, args, kwargs)`` to the states that both branches make together."""

# where the batch sits in the arguments of a layer, counted so that multi-axis rotary tensors, (axes, B, N), fit too
BATCH_DIMENSIONS = {"position_ids": -2, "position_embeddings": -3}


def split_rows(split: RowSplit) -> Mix:
    """Give the hard mix: each row goes through one branch only."""
    return functools.partial(_mix_rows, split)


def blend_positions(routing: RoutingState, layer: int) -> Mix:
    """Give the soft mix ``keep * run(h) + (1 - keep) * skip(h)``, with the keep weight of each position.

    Both are computed everywhere, the run first. The fixed order is what lets ranks of a sharded model (ZeRO-3) gather
    the same weights at the same time.
    """
    return functools.partial(_mix_weights, routing, layer)


def _mix_rows(
    split: RowSplit, run: Run, skip: Callable[[Tensor], Tensor], hidden_states: Tensor, args: tuple, kwargs: dict
) -> Tensor:
    if split.none_kept:
        return skip(hidden_states)
    _refuse_opaque_mask(kwargs.get("attention_mask"))
    kept_rows, skipped_rows = split.rows(hidden_states.device)
    kept_args = [_select_rows(value, kept_rows, split) for value in args]
    kept_kwargs = {
        name: _select_rows(value, kept_rows, split, BATCH_DIMENSIONS.get(name, 0)) for name, value in kwargs.items()
    }
    kept = _only_tensor(run(hidden_states.index_select(0, kept_rows), *kept_args, **kept_kwargs))
    skipped = skip(hidden_states.index_select(0, skipped_rows))
    output = torch.empty_like(hidden_states)
    return output.index_copy_(0, kept_rows, kept).index_copy_(0, skipped_rows, skipped)


def _mix_weights(
    routing: RoutingState,
    layer: int,
    run: Run,
    skip: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    args: tuple,
    kwargs: dict,
) -> Tensor:
    output = _only_tensor(run(hidden_states, *args, **kwargs))
    keep = routing.position_weights(layer)  # (B, N)
    if keep.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"turn_ids is {tuple(keep.shape)}, but the layer runs on {tuple(hidden_states.shape[:2])} (B, N). "
            "Give turn_ids for every position, image positions included."
        )
    keep = keep.to(hidden_states.device, hidden_states.dtype).unsqueeze(-1)  # (B, N, 1)
    return keep * output + (1 - keep) * skip(hidden_states)


def _only_tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The base layer gave a {type(output).__name__}; routed layers need a decoder whose layers give one "
            "(B, N, D) tensor. Use a decoder family that does, or leave this one dense."
        )
    return output


def _refuse_opaque_mask(attention_mask: Any) -> None:
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"The attention mask is a {type(attention_mask).__name__}; rows can be taken from a tensor only. Use "
            "attn_implementation 'sdpa', 'eager' or 'flash_attention_2'."
        )


def _select_rows(value: Any, rows: Tensor, split: RowSplit, dim: int = 0) -> Any:
    """Take the rows of one layer argument; what has no batch dimension of this size passes unchanged."""
    if isinstance(value, (tuple, list)):
        return type(value)(_select_rows(item, rows, split, dim) for item in value)
    # vectors are lengths or flags, never rows of states
    if isinstance(value, Tensor) and value.dim() > 1 and value.dim() >= -dim and value.shape[dim] == split.num_rows:
        return value.index_select(dim, rows)
    return value
