"""Router interface: what every router does, and what it may leave to its base class."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fuzzyroe.calibrate import Measurements
from fuzzyroe.escalation import Escalation
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import FuzzyRuleBase, load_rule_base, save_rule_base


class Measurer(Protocol):
    """Forward passes over training samples, on all ranks: what a router can be fitted by."""

    num_layers: int

    def measure(self, single_layers: bool = False) -> Measurements:
        """Measure features, and losses by number of skipped layers; with ``single_layers`` without each layer too."""

    def find_order(self) -> list[int]:
        """Order the layers, first to be skipped first, as many as are skipped at most."""

    def batches(self, num_samples: int) -> Iterator[dict[str, Tensor]]:
        """Give this rank's batches of the first samples."""

    def skip_rate(self, batches: Iterable[dict[str, Tensor]], ask: Callable[[RoutingState], None]) -> float:
        """Observe how much the attached router skips on all ranks' batches, once ``ask`` has changed their states."""


class Router(nn.Module):
    """Decides, for every turn of every example, the keep weight of every layer.

    A router that plans ahead fills all keep weights before the first layer, in ``plan``. A layer-wise one sets
    ``decides_layer_wise`` and is asked layer by layer, in ``decide``. Neither is called through ``forward``, so
    parameters belong in submodules that they call, where a sharded model gathers them; parts that belong to one decoder
    layer go into a ModuleList ``layers``, whose items are placed beside the decoder layers.

    A constructor takes its options by name, ``num_layers`` and, if it wants, ``hidden_size``. Options in
    ``option_names`` are kept by checkpoints; a line in ``ROUTERS`` is all that is needed besides.

    Attributes:
        decides_layer_wise: Whether keep weights come from ``decide`` and not from ``plan``.
        is_plan_router: Whether the stages router, adapter and finetune can attach a new one (``--router``).
        is_scored: Whether the plan follows a score that a rule base computes from features.
        stays_in_float32: Whether the router's numbers keep their data type when the model's is changed.
        option_names: Arguments of the constructor that a checkpoint keeps; the router has an attribute for each.
        enabled: Whether the router routes prompts on its own when the model is not training; a state passed by the
            caller is routed either way.
        target_skip_ratio: Mean skip rate planned for where a state asks for none, a number or a tensor ().
        escalation: Who runs more layers than planned once the prefill is through; None for nobody.
    """

    decides_layer_wise: ClassVar[bool] = False
    is_plan_router: ClassVar[bool] = False
    is_scored: ClassVar[bool] = False
    stays_in_float32: ClassVar[bool] = False
    option_names: ClassVar[tuple[str, ...]] = ()
    target_skip_ratio: Tensor | float
    escalation: Escalation | None = None

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Fill ``routing.result.keep_weights``, (B, T, L), or prepare what ``decide`` needs (by default nothing).

        Args:
            hidden_states: States before the first decoder layer, (B, N, D).
            routing: Where turns, images and questions are; ``target_skip_ratio`` may hold a target for all or per row.
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

    def fit(self, measurer: Measurer, arguments: Any) -> tuple[Router, dict[str, Any]]:
        """Fit the router to training samples by forward passes; by default it is only set to the target.

        Called on every rank, which must ask the measurer for the same passes.

        Args:
            measurer: Runs the passes.
            arguments: Flags of the stage: ``target_skip_ratio``, ``max_skip_ratio`` and what else the router reads.

        Returns:
            This router or one in its place, with what was found, as JSON knows it.
        """
        self.set_skip_rate(arguments.target_skip_ratio)
        return self, {}

    @property
    def max_skip_ratio(self) -> float:
        """Largest target that may be asked for."""
        return 1.0

    def check_target(self, target: Tensor | float, num_rows: int | None = None) -> None:
        """Refuse a target that this router cannot meet.

        Args:
            target: One mean skip rate, or one per row, (B,). A tensor on another device is waited for.
            num_rows: Batch size B; None allows a single target only.

        Raises:
            TypeError: If the target is no number and no tensor of floating-point numbers.
            ValueError: If one lies outside [0, ``max_skip_ratio``] or their number is not B.
        """
        if isinstance(target, Tensor):
            if not target.is_floating_point():
                raise TypeError(f"skip_rate is a tensor of {target.dtype}; it needs floating-point numbers in [0, 1].")
            allowed = [()] if num_rows is None else [(), (num_rows,)]
            if tuple(target.shape) not in allowed:
                raise ValueError(
                    f"skip_rate has shape {tuple(target.shape)}; allowed is one of {allowed}. Give one number for all "
                    "rows, or one per row of the batch."
                )
        elif not isinstance(target, (int, float)) or isinstance(target, bool):
            raise TypeError(
                f"skip_rate is a {type(target).__name__}; allowed is a number, or a tensor with one number per row."
            )
        for ratio in target.detach().reshape(-1).tolist() if isinstance(target, Tensor) else [target]:
            if not 0 <= ratio <= self.max_skip_ratio + 1e-6:  # ratios may be kept in float32
                raise ValueError(
                    f"Skip rate {ratio} lies outside the calibrated range [0, {self.max_skip_ratio:.3f}]; choose one "
                    "inside, or calibrate with a larger max_skip_ratio."
                )

    def requested_ratios(self, routing: RoutingState, device: torch.device) -> Tensor:
        """Give the target that the state asks for, else the router's own: of each row, (B, 1), or of all, (1, 1)."""
        target = self.target_skip_ratio if routing.target_skip_ratio is None else routing.target_skip_ratio
        return torch.as_tensor(target, dtype=torch.float32, device=device).reshape(-1, 1)

    def set_skip_rate(self, target: float) -> None:
        """Plan for another mean skip rate from now on; nothing is retrained.

        Raises:
            ValueError: If the router cannot meet it.
        """
        self.check_target(target)
        self.target_skip_ratio = float(target)

    def save_options(self, folder: Path) -> dict[str, Any]:
        """Write what a checkpoint needs to rebuild the router, besides its tensors.

        Args:
            folder: Folder of the checkpoint; a rule base among the options becomes a YAML file there.

        Returns:
            The options as JSON knows them, for ``build``.
        """
        options: dict[str, Any] = {}
        for name in self.option_names:
            value = getattr(self, name)
            if isinstance(value, FuzzyRuleBase):
                save_rule_base(value, folder / f"{name}.yaml")
                value = f"{name}.yaml"
            elif hasattr(value, "to_dict"):
                value = value.to_dict()
            # JSON has no nan, which stands for an operating point that no target names
            options[name] = None if isinstance(value, float) and math.isnan(value) else value
        if self.escalation is not None:
            options["escalation"] = self.escalation.save(folder)
        return options

    @classmethod
    def build(
        cls, options: dict[str, Any], num_layers: int, hidden_size: int, find_file: Callable[[str], str] = str
    ) -> Router:
        """Make a router from options: a new one, or one of a checkpoint, whose tensors are loaded afterwards.

        Args:
            options: Arguments of the constructor by name, or what ``save_options`` gave.
            num_layers: Layers of the decoder, L.
            hidden_size: Width of the decoder, D.
            find_file: Gives the local path of a file of the checkpoint.
        """
        # a constructor names the sizes that it needs
        sizes = {"num_layers": num_layers, "hidden_size": hidden_size}
        wanted = inspect.signature(cls).parameters
        given: dict[str, Any] = {name: size for name, size in sizes.items() if name in wanted}
        options = dict(options)
        escalation = options.pop("escalation", None)
        for name, value in options.items():
            is_file = name == "rule_base" and isinstance(value, str)
            given[name] = load_rule_base(find_file(value)) if is_file else value
        router = cls(**given)
        router.escalation = None if escalation is None else Escalation.load(escalation, find_file)
        return router

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move with the model, in its data type or, if the router asks for it, in its own."""

        # `fn` casts and moves at once: let it, then take over the device alone
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only if self.stays_in_float32 else fn, recurse)
