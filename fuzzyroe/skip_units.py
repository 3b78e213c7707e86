"""Which part of a decoder layer a skip leaves out: all of it, its attention, or its feed-forward part.

The skipped part is replaced by the adapter on the part's own input. Attention and feed-forward are routed inside the
stock layer's forward, which therefore adds residuals and norms as it always does.

Reference:
    Router-Tuning (arXiv:2410.13184) compares the three; RoE (arXiv:2407.14093) skips whole layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fuzzyroe.mixing import Mix


@dataclass(frozen=True)
class SkipUnit:
    """A part of a decoder layer that can be skipped.

    Attributes:
        modules: Submodules that a decoder layer needs for it.
        stores_keys: Whether rows that skip it still store keys and values in this layer.
        forward: ``(layer, mix, hidden_states, args, kwargs) -> (B, N, D)``, the layer's forward with the part mixed.
    """

    modules: tuple[str, ...]
    stores_keys: bool
    forward: Callable[[nn.Module, Mix, Tensor, tuple, dict[str, Any]], Tensor]


class _Substituted:
    """A decoder layer of which one submodule is another callable, for the length of one call.

    The stock forward runs with this as ``self``: what was decided reaches the submodule as an argument, and nothing is
    parked on a module.
    """

    forward = None  # asked by checkpointing, to find the outermost of several wrapped forwards: never this one

    def __init__(self, layer: nn.Module, **submodules: Callable) -> None:
        self._layer = layer
        self.__dict__.update(submodules)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _forward_layer(layer: nn.Module, mix: Mix, hidden_states: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    run = functools.partial(layer.base_class.forward, layer)
    return mix(run, layer.skip_output, hidden_states, args, kwargs)


def _forward_attention(
    layer: nn.Module, mix: Mix, hidden_states: Tensor, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    def run(states: Tensor, *part_args: Any, **part_kwargs: Any) -> Tensor:
        return layer.self_attn(states, *part_args, **part_kwargs)[0]

    def attend(hidden_states: Tensor, *part_args: Any, **part_kwargs: Any) -> tuple[Tensor, None]:
        return mix(run, layer.adapter, hidden_states, part_args, part_kwargs), None

    return layer.base_class.forward(_Substituted(layer, self_attn=attend), hidden_states, *args, **kwargs)


def _forward_ffn(layer: nn.Module, mix: Mix, hidden_states: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    def feed(hidden_states: Tensor) -> Tensor:
        return mix(layer.mlp, layer.adapter, hidden_states, (), {})

    return layer.base_class.forward(_Substituted(layer, mlp=feed), hidden_states, *args, **kwargs)


SKIP_UNITS: dict[str, SkipUnit] = {
    "layer": SkipUnit(("input_layernorm",), False, _forward_layer),
    "attention": SkipUnit(("input_layernorm", "self_attn"), False, _forward_attention),
    "ffn": SkipUnit(("input_layernorm", "mlp"), True, _forward_ffn),
}
"""Skip units by name."""


def get_skip_unit(name: str) -> SkipUnit:
    """Look a skip unit up.

    Raises:
        KeyError: If there is none of this name; the message lists the known ones.
    """
    if name not in SKIP_UNITS:
        raise KeyError(f"Skip unit '{name}' is unknown; use one of {', '.join(SKIP_UNITS)}.")
    return SKIP_UNITS[name]


def get_unit_name(unit: SkipUnit) -> str:
    """Give the name under which a skip unit is in ``SKIP_UNITS``."""
    return next(name for name, known in SKIP_UNITS.items() if known == unit)
