"""The routed forward of a decoder layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fuzzyroe.cache import advance, rows_to_run
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.row_split import RowSplit

# where the batch sits in the arguments of a layer, counted so that multi-axis rotary tensors, (axes, B, N), fit too
BATCH_DIMENSIONS = {"position_ids": -2, "position_embeddings": -3}


class RoutedLayer:
    """Mixin that goes in front of a stock decoder layer class and routes its forward.

    Without ``routing`` and without a decision in the cache this is the base layer, bit for bit. The layer needs
    ``input_layernorm``, ``adapter`` and ``route_index``; ``attach`` provides the last two.
    """

    base_class: type[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, routing: RoutingState | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer, the skip branch, or both.

        Args:
            hidden_states: Input of the layer, (B, N, D).
            *args: Passed to the base layer.
            routing: What to skip; in hard mode the decision of a non-empty cache wins over it.
            **kwargs: Passed to the base layer; ``past_key_values`` is the cache.

        Returns:
            Output of the layer, (B, N, D).

        Raises:
            ValueError: If reentrant checkpointing is on, or ``routing`` does not fit the batch.
            TypeError: If cache or mask cannot be cut down to the kept rows, or the base layer gives more than a tensor.
        """
        if routing is not None:
            self._refuse_reentrant_checkpointing()
            if routing.mode == "soft":
                base_output = _only_tensor(super().forward(hidden_states, *args, **kwargs))
                routing.counts[self.route_index] = hidden_states.shape[0]
                return self._blend(hidden_states, base_output, routing)
        past_key_values = kwargs.get("past_key_values")
        split = rows_to_run(past_key_values, self.route_index, routing, hidden_states.shape[0])
        if routing is not None:
            routing.counts[self.route_index] = hidden_states.shape[0] if split is None else split.num_kept
        if split is None or split.all_kept:
            return super().forward(hidden_states, *args, **kwargs)
        if split.none_kept:
            advance(past_key_values, self.route_index, hidden_states.shape[1])
            return self.skip_output(hidden_states)
        _refuse_opaque_mask(kwargs.get("attention_mask"))
        kept_rows, skipped_rows = split.rows(hidden_states.device)
        kept_args = [_select_rows(value, kept_rows, split) for value in args]
        kept_kwargs = {
            name: _select_rows(value, kept_rows, split, BATCH_DIMENSIONS.get(name, 0)) for name, value in kwargs.items()
        }
        kept = _only_tensor(super().forward(hidden_states.index_select(0, kept_rows), *kept_args, **kept_kwargs))
        skipped = self.skip_output(hidden_states.index_select(0, skipped_rows))
        output = torch.empty_like(hidden_states)
        return output.index_copy_(0, kept_rows, kept).index_copy_(0, skipped_rows, skipped)

    def skip_output(self, hidden_states: Tensor) -> Tensor:
        """Give ``h + adapter(input_layernorm(h))``, (B, N, D)."""
        return hidden_states + self.adapter(self.input_layernorm(hidden_states))

    def _blend(self, hidden_states: Tensor, base_output: Tensor, routing: RoutingState) -> Tensor:
        """Give ``keep * layer(h) + (1 - keep) * skip(h)``; both are computed everywhere, the base layer first.

        The fixed order is what lets ranks of a sharded model (ZeRO-3) gather the same weights at the same time.
        """
        keep = routing.position_weights(self.route_index)  # (B, N)
        if keep.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"turn_ids is {tuple(keep.shape)}, but the layer runs on {tuple(hidden_states.shape[:2])} (B, N). "
                "Give turn_ids for every position, image positions included."
            )
        keep = keep.to(hidden_states.device, hidden_states.dtype).unsqueeze(-1)  # (B, N, 1)
        return keep * base_output + (1 - keep) * self.skip_output(hidden_states)

    def _refuse_reentrant_checkpointing(self) -> None:
        # Reentrant checkpointing drops the gradient of everything that is not a positional tensor, silently
        checkpoint = getattr(self, "_gradient_checkpointing_func", None)
        is_on = self.training and getattr(self, "gradient_checkpointing", False)
        if is_on and getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                "Gradient checkpointing runs with use_reentrant=True, under which routing gets no gradient; only "
                "use_reentrant=False is allowed. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


@functools.cache
def routed_class(base: type[nn.Module]) -> type[nn.Module]:
    """Give the routed subclass of a decoder layer class, the same one each time."""
    return type(f"Routed{base.__name__}", (RoutedLayer, base), {"base_class": base, "__module__": base.__module__})


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
