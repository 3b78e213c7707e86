"""Training of adapters without answers: each forecasts what its layer gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fuzzyroe.attach import find_decoder_layers


class Forecast:
    """Loss of the adapters as forecasts of their layers, on the states of the dense model.

    For a layer with input h and output y, over the positions that are no padding::

        sum |h + adapter(input_layernorm(h)) - y|^2  /  sum |h - y|^2

    An untrained adapter, which is zero, has loss 1, one that stands in for its layer perfectly 0. The loss is the mean
    over layers. Every layer teaches its adapter in every step, whatever a router would skip, and no error of one
    adapter reaches the next; the model is run once, without a gradient.

    Args:
        model: Routed model.

    Reference:
        Informed Routing (arXiv:2510.13831), lightweight feature forecasters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = find_decoder_layers(model)

    def __call__(self, engine: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Loss of a batch, a scalar.

        Args:
            engine: The model, or the engine around it.
            inputs: What it is called with, with ``attention_mask``, (B, N).
        """
        mask, losses = inputs["attention_mask"].bool(), []

        def compare(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            hidden = (args[0] if args else kwargs["hidden_states"]).detach()
            with torch.enable_grad():
                forecast = layer.skip_output(hidden)  # (B, N, D)
                error, change = (((state - output)[mask].float() ** 2).sum() for state in (forecast, hidden))
                losses.append(error / change.clamp(min=torch.finfo(torch.float32).tiny))

        handles = [layer.register_forward_hook(compare, with_kwargs=True) for layer in self.layers]
        try:
            with torch.no_grad():
                engine(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(losses).mean()
