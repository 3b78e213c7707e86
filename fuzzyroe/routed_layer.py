"""The routed forward of a decoder layer."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from fuzzyroe.cache import advance, rows_to_run
from fuzzyroe.mixing import blend_positions, split_rows
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.skip_units import SkipUnit


class RoutedLayer:
    """Mixin that goes in front of a stock decoder layer class and routes its forward.

    Without ``routing`` and without a decision in the cache this is the base layer, bit for bit. The layer needs
    ``input_layernorm``, ``adapter``, ``route_index`` and ``skip_unit``; ``attach`` provides the last three.
    """

    base_class: type[nn.Module]
    skip_unit: SkipUnit

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
        num_rows = hidden_states.shape[0]
        if routing is not None:
            self._refuse_reentrant_checkpointing()
            if routing.mode == "soft":
                routing.result.layer_runs[self.route_index] = num_rows
                mix = blend_positions(routing, self.route_index)
                return self.skip_unit.forward(self, mix, hidden_states, args, kwargs)
        past_key_values = kwargs.get("past_key_values")
        split = rows_to_run(past_key_values, self.route_index, routing, num_rows, self.skip_unit.stores_keys)
        if routing is not None:
            routing.result.layer_runs[self.route_index] = num_rows if split is None else split.num_kept
        if split is None or split.all_kept:
            return super().forward(hidden_states, *args, **kwargs)
        if split.none_kept and not self.skip_unit.stores_keys:
            advance(past_key_values, self.route_index, hidden_states.shape[1])
        return self.skip_unit.forward(self, split_rows(split), hidden_states, args, kwargs)

    def skip_output(self, hidden_states: Tensor) -> Tensor:
        """Give what a wholly skipped layer gives, ``h + adapter(input_layernorm(h))``, (B, N, D)."""
        return hidden_states + self.adapter(self.input_layernorm(hidden_states))

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
