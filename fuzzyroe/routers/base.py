"""The interface of a router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fuzzyroe.routing_state import RoutingState


class Router(nn.Module):
    """Decides, for every turn of every example, the keep weight of every layer.

    A router that plans ahead fills all keep weights before the first layer, in ``plan``. A layer-wise one sets
    ``decides_layer_wise`` and is asked layer by layer, in ``decide``. Neither is called through ``forward``, so
    parameters belong in submodules that they call, where a sharded model gathers them; parts that belong to one decoder
    layer go into a ModuleList ``layers``, whose items are placed beside the decoder layers.

    Attributes:
        decides_layer_wise: Whether keep weights come from ``decide`` and not from ``plan``.
        stays_in_float32: Whether the router's numbers keep their data type when the model's is changed.
        enabled: Whether the router routes prompts on its own when the model is not training; a state passed by the
            caller is routed either way.
        target_skip_ratio: Mean skip rate planned for where a state asks for none, a number or a tensor ().
    """

    decides_layer_wise: ClassVar[bool] = False
    stays_in_float32: ClassVar[bool] = False
    target_skip_ratio: Tensor | float

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Fill ``routing.result.keep_weights``, (B, T, L), or prepare what ``decide`` needs (by default nothing).

        Args:
            hidden_states: States before the first decoder layer, (B, N, D).
            routing: Where turns, images and questions are, and the ``target_skip_ratio`` of all or of each row.
        """

    def prepare(self, decoder: nn.Module, inputs: dict[str, Any], routing: RoutingState) -> dict[str, Any]:
        """Change what the decoder is given for a prompt, once ``plan`` was called; by default nothing.

        Args:
            decoder: The module that holds the layers.
            inputs: Keywords of its forward, with ``inputs_embeds`` (B, N, D) and ``routing``.
            routing: The same state as in them.

        Returns:
            The keywords to run it with.
        """
        return inputs

    def decide(self, layer: int, hidden_states: Tensor, routing: RoutingState) -> Tensor:
        """Give the keep weights of one layer from its own input; asked of layer-wise routers only.

        Args:
            layer: Layer index.
            hidden_states: Input of that layer, (B, N, D), on the device of the layer before it.
            routing: The state that ``plan`` saw; decisions of earlier layers are in it.

        Returns:
            Keep weights in [0, 1], (B, T).
        """
        raise NotImplementedError(f"{type(self).__name__} has no `decide`; a layer-wise router needs one.")

    @property
    def max_skip_ratio(self) -> float:
        """Largest mean skip rate that may be asked for."""
        return 1.0

    def check_target(self, skip_rate: Tensor | float, num_rows: int | None = None) -> None:
        """Refuse a budget that this router cannot meet.

        Args:
            skip_rate: One mean skip rate, or one per row, (B,). A tensor on another device is waited for.
            num_rows: Batch size B; None allows a single rate only.

        Raises:
            TypeError: If the budget is no number and no tensor of floating-point numbers.
            ValueError: If a rate lies outside [0, ``max_skip_ratio``] or their number is not B.
        """
        check_skip_rate(skip_rate, self.max_skip_ratio, num_rows)

    def requested_rates(self, routing: RoutingState, device: torch.device) -> Tensor:
        """Give the rate that the state asks for, else the router's own: of each row, (B, 1), or of all, (1, 1)."""
        rate = self.target_skip_ratio if routing.target_skip_ratio is None else routing.target_skip_ratio
        return torch.as_tensor(rate, dtype=torch.float32, device=device).reshape(-1, 1)

    def set_skip_rate(self, skip_rate: float) -> None:
        """Plan for another mean skip rate from now on; nothing is retrained.

        Raises:
            ValueError: If the router cannot meet such a rate.
        """
        self.check_target(skip_rate)
        self.target_skip_ratio = float(skip_rate)

    def settings(self) -> dict[str, Any]:
        """Give what ``from_checkpoint`` needs besides tensors and files, as JSON knows it."""
        return {}

    def save_files(self, folder: Path) -> None:
        """Write the files that belong to the router into a checkpoint's folder; by default there are none."""

    @classmethod
    def from_checkpoint(
        cls, options: dict[str, Any], num_layers: int, hidden_size: int, folder_file: Callable[[str], str]
    ) -> Router:
        """Rebuild a router from what a checkpoint says; its tensors are loaded afterwards.

        Args:
            options: What ``settings`` gave.
            num_layers: Layers of the decoder, L.
            hidden_size: Width of the decoder, D.
            folder_file: Gives the local path of a file of the checkpoint.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be rebuilt from a checkpoint; give it `from_checkpoint`.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move with the model, in its data type or, if the router asks for it, in its own."""

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only if self.stays_in_float32 else fn, recurse)


def check_skip_rate(skip_rate: Tensor | float, max_skip_ratio: float, num_rows: int | None = None) -> None:
    """Refuse what is no mean skip rate, as ``Router.check_target`` says."""
    if isinstance(skip_rate, Tensor):
        if not skip_rate.is_floating_point():
            raise TypeError(f"skip_rate is a tensor of {skip_rate.dtype}; it needs floating-point numbers in [0, 1].")
        allowed = [()] if num_rows is None else [(), (num_rows,)]
        if tuple(skip_rate.shape) not in allowed:
            raise ValueError(
                f"skip_rate has shape {tuple(skip_rate.shape)}; allowed is one of {allowed}. Give one number for all "
                "rows, or one per row of the batch."
            )
        rates = skip_rate.detach().reshape(-1).tolist()
    elif isinstance(skip_rate, (int, float)) and not isinstance(skip_rate, bool):
        rates = [float(skip_rate)]
    else:
        raise TypeError(
            f"skip_rate is a {type(skip_rate).__name__}; allowed is a number, or a tensor with one number per row."
        )
    for rate in rates:
        if not 0 <= rate <= max_skip_ratio + 1e-6:  # rates may be kept in float32
            raise ValueError(
                f"Skip rate {rate} lies outside the calibrated range [0, {max_skip_ratio:.3f}]; choose one inside, or "
                "calibrate with a larger max_skip_ratio."
            )
