"""The routed layer: a stock decoder layer that runs itself, its skip adapter, or both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fuzzyroe.cache import advance, rows_to_run
from fuzzyroe.routing_state import RoutingState, RowSplit

if TYPE_CHECKING:
    AnyDecoderLayer = nn.Module
else:
    AnyDecoderLayer = object  # the stock class behind the mixin decides which module it is

SKIP_UNITS: dict[str, str | None] = {"layer": None, "attention": "self_attn", "ffn": "mlp"}
"""What a skip leaves out, by name, with the submodule that this is; None for the whole layer.

Reference:
    Router-Tuning (arXiv:2410.13184) compares the three; RoE (arXiv:2407.14093) skips whole layers.
"""

# where the batch sits in the arguments of a layer, counted so that multi-axis rotary tensors, (axes, B, N), fit too
BATCH_DIMENSIONS = {"position_ids": -2, "position_embeddings": -3}


class RoutedLayer(AnyDecoderLayer):
    """Mixin that goes in front of a stock decoder layer class and routes its forward.

    With keep weights k, of positions while training and 0 or 1 for each row at inference, it computes::

        k * layer(h) + (1 - k) * (h + adapter(input_layernorm(h)))

    Where only attention or the MLP is skipped, the same mix replaces that part inside the stock forward, which adds
    residuals and norms as ever. Without ``routing`` and without a decision in the cache this is the base layer, bit
    for bit. ``attach`` provides ``adapter``, ``route_index`` and ``skip_unit``, a name in ``SKIP_UNITS``.
    """

    base_class: type[nn.Module]
    adapter: nn.Module
    input_layernorm: nn.Module
    route_index: int
    skip_unit: str

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Ask a layer-wise router, then run; in front of checkpointing, which would ask it twice."""
        routing = kwargs.get("routing")
        if routing is not None and routing.decide is not None:
            routing.decide_layer(self.route_index, args[0] if args else kwargs["hidden_states"])
        return super().__call__(*args, **kwargs)

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
        if routing is not None and routing.resume is not None:
            # the input of a resumed pass is known: the stored states, whatever the decoder made of its embeddings
            first, states = routing.resume
            if self.route_index < first:
                return hidden_states
            hidden_states = states if self.route_index == first else hidden_states
        cache, part_name = kwargs.get("past_key_values"), SKIP_UNITS[self.skip_unit]
        keep = self._keep(hidden_states, routing, cache)
        if routing is not None and routing.entries is not None and isinstance(keep, RowSplit):
            routing.entries.note(self.route_index, keep, hidden_states)
        if keep is None or (isinstance(keep, RowSplit) and keep.all_kept):
            return super().forward(hidden_states, *args, **kwargs)
        if isinstance(keep, RowSplit) and keep.none_kept and not self.stores_keys:
            # the mask of every row is sized by the cache, which must count what nobody stored
            advance(cache, self.route_index, hidden_states.shape[1])
        if part_name is None:
            return mix(keep, super().forward, self.skip_output, hidden_states, args, kwargs)
        substitute = _Substitute(self, part_name, functools.partial(self._mixed_part, keep, part_name))
        return self.base_class.forward(substitute, hidden_states, *args, **kwargs)

    def skip_output(self, hidden_states: Tensor) -> Tensor:
        """Give what a wholly skipped layer gives, ``h + adapter(input_layernorm(h))``, (B, N, D)."""
        return hidden_states + self.adapter(self.input_layernorm(hidden_states))

    @property
    def stores_keys(self) -> bool:
        """Whether rows that skip still store keys and values in this layer, as where only the MLP is skipped."""
        return self.skip_unit == "ffn"

    def _keep(self, hidden_states: Tensor, routing: RoutingState | None, cache: Any) -> RowSplit | Tensor | None:
        """Give the keep weights of positions, (B, N), or the rows that run; None where nothing was decided."""
        num_rows = hidden_states.shape[0]
        if routing is None:
            return rows_to_run(cache, self.route_index, None, num_rows, self.stores_keys)
        self._refuse_reentrant_checkpointing()
        if routing.mode == "soft":
            weights = routing.position_weights(self.route_index)
            if weights.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"turn_ids is {tuple(weights.shape)}, but the layer runs on {tuple(hidden_states.shape[:2])} "
                    "(B, N). Give turn_ids for every position, image positions included."
                )
            routing.result.layer_runs[self.route_index] = num_rows
            return weights
        split = rows_to_run(cache, self.route_index, routing, num_rows, self.stores_keys)
        routing.result.layer_runs[self.route_index] = num_rows if split is None else split.num_kept
        return split

    def _mixed_part(self, keep: RowSplit | Tensor, name: str, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Mix one submodule with the adapter; stock attention gives a tuple, of which nobody reads the second item."""
        part = getattr(self, name)
        if name != "self_attn":
            return mix(keep, part, self.adapter, hidden_states, args, kwargs)
        return mix(keep, lambda *a, **k: part(*a, **k)[0], self.adapter, hidden_states, args, kwargs), None

    def _refuse_reentrant_checkpointing(self) -> None:
        # Reentrant checkpointing drops the gradient of everything that is not a positional tensor, silently
        checkpoint = getattr(self, "_gradient_checkpointing_func", None)
        is_on = self.training and getattr(self, "gradient_checkpointing", False)
        if is_on and getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                "Gradient checkpointing runs with use_reentrant=True, under which routing gets no gradient; only "
                "use_reentrant=False is allowed. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


def mix(
    keep: RowSplit | Tensor,
    run: Callable[..., Any],
    skip: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
) -> Tensor:
    """Give ``keep * run(h) + (1 - keep) * skip(h)``.

    Args:
        keep: Keep weights of the positions, (B, N): both branches are computed everywhere. Or the rows that run: each
            row goes through one branch only.
        run: The part that is routed; called with ``hidden_states``, ``args`` and ``kwargs`` of the rows it runs.
        skip: What stands in for it.
        hidden_states: Input of both, (B, N, D).
        args: Further arguments of ``run``.
        kwargs: Further keywords of ``run``.

    Returns:
        The mixed states, (B, N, D).

    Raises:
        TypeError: If the mask cannot be cut down to the kept rows, or ``run`` gives more than a tensor.
    """
    if isinstance(keep, Tensor):
        # always the run first: so ranks of a sharded model (ZeRO-3) gather the same weights at the same time
        output = _only_tensor(run(hidden_states, *args, **kwargs))
        weights = keep.to(hidden_states.device, hidden_states.dtype).unsqueeze(-1)  # (B, N, 1)
        return weights * output + (1 - weights) * skip(hidden_states)
    if keep.none_kept:
        return skip(hidden_states)
    mask = kwargs.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(
            f"The attention mask is a {type(mask).__name__}; rows can be taken from a tensor only. Use "
            "attn_implementation 'sdpa', 'eager' or 'flash_attention_2'."
        )
    kept_rows, skipped_rows = keep.rows(hidden_states.device)
    kept_args = [select_rows(value, kept_rows, keep.num_rows) for value in args]
    kept_kwargs = {
        name: select_rows(value, kept_rows, keep.num_rows, BATCH_DIMENSIONS.get(name, 0))
        for name, value in kwargs.items()
    }
    kept = _only_tensor(run(hidden_states.index_select(0, kept_rows), *kept_args, **kept_kwargs))
    skipped = skip(hidden_states.index_select(0, skipped_rows))
    output = torch.empty_like(hidden_states)
    return output.index_copy_(0, kept_rows, kept).index_copy_(0, skipped_rows, skipped)


@functools.cache
def routed_class(base: Any) -> Any:
    """Give the routed subclass of a decoder layer class, the same one each time."""
    return type(f"Routed{base.__name__}", (RoutedLayer, base), {"base_class": base, "__module__": base.__module__})


class _Substitute:
    """A decoder layer of which one submodule is another callable, for the length of one call.

    The stock forward runs with this as ``self``: what was decided reaches the submodule as an argument, and nothing is
    parked on a module.
    """

    forward = None  # asked by checkpointing, to find the outermost of several wrapped forwards: never this one

    def __init__(self, layer: nn.Module, name: str, part: Callable[..., Any]) -> None:
        self._layer = layer
        self.__dict__[name] = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _only_tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The base layer gave a {type(output).__name__}; routed layers need a decoder whose layers give one "
            "(B, N, D) tensor. Use a decoder family that does, or leave this one dense."
        )
    return output


def select_rows(value: Any, rows: Tensor, num_rows: int, dim: int = 0) -> Any:
    """Take the rows of one layer argument; what has no batch dimension of this size passes unchanged."""
    if isinstance(value, (tuple, list)):
        return type(value)(select_rows(item, rows, num_rows, dim) for item in value)
    # vectors are lengths or flags, never rows of states
    if isinstance(value, Tensor) and value.dim() > 1 and value.dim() >= -dim and value.shape[dim] == num_rows:
        return value.index_select(dim, rows)
    return value
