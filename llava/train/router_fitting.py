"""Fitting of the attached router: forward passes that measure, on all ranks, and the router that follows from them.

Nothing is trained. Every pass computes both branches of every layer in the same order on every rank, so it runs under
ZeRO-3; ranks measure different samples, exchange the results and fit the same router. What is measured, and what
follows from it, is up to the router (``Router.fit``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Subset

from fuzzyroe.attach import find_decoder
from fuzzyroe.budget import greedy_layer_order
from fuzzyroe.calibrate import Measurements
from fuzzyroe.features import FEATURES, compute_features, summarise
from fuzzyroe.losses import answered_turns, turn_losses
from fuzzyroe.routers import get_router_class, plan_router_names
from fuzzyroe.routers.roe.training import PRESETS
from fuzzyroe.routing_state import RoutingState
from llava.model.builder import Checkpoint
from llava.model.families import get_image_token_id
from llava.model.llava_llama import attach_routing
from llava.train.arguments import (
    DEFAULT_ADAPTER_WIDTH,
    DEFAULT_COMPAT,
    DEFAULT_RULE_BASE,
    DEFAULT_SUMMARY,
    PlanArguments,
    RoEArguments,
)
from llava.train.trainer import LlavaTrainer
from llava.train.zero3 import prepare_for_forward


@dataclass(frozen=True)
class CalibrationSize:
    """How much is measured; each number is the value of the flag of its name, which says what it counts."""

    order_samples: int = 0
    calibration_samples: int = 0
    score_samples: int = 0
    calibration_batch_size: int = 32
    max_skip_ratio: float = 0.5
    budget_samples: int = 0

    @classmethod
    def from_flags(cls, arguments: Any) -> CalibrationSize:
        """Read the flags of a stage, which may lack those that its routers do not read."""
        names = [item.name for item in fields(cls) if hasattr(arguments, item.name)]
        return cls(**{name: getattr(arguments, name) for name in names})


@dataclass
class Cost:
    """What fitting has cost so far: samples of the training data touched, and sample-passes through the decoder."""

    samples: int = 0
    passes: int = 0


def attach_new_router(model: Any, arguments: Any) -> None:
    """Attach the router that a stage trains or fits, with new adapters, to a dense model."""
    flags: dict[str, Any] = {}
    if isinstance(arguments, PlanArguments):
        kind, init = get_router_class(arguments.router or plan_router_names()[0]), "zero"
        flags["rule_base"] = arguments.rule_base or DEFAULT_RULE_BASE
    elif isinstance(arguments, RoEArguments):
        kind, init = get_router_class("linear"), "zero" if arguments.freeze_adapters else "xavier"
        flags["summary"] = arguments.routing_summary or DEFAULT_SUMMARY
        flags["compat"] = PRESETS[arguments.roe_compat or DEFAULT_COMPAT]
    # a router is given the flags that are options of its own, e.g. only a scored one a rule base
    options = {name: value for name, value in flags.items() if name in kind.option_names}
    text_config = model.config.text_config
    router = kind.build(options, text_config.num_hidden_layers, text_config.hidden_size)
    attach_routing(model, router, arguments.adapter_hidden_dim or DEFAULT_ADAPTER_WIDTH, init)


def fit_router(
    trainer: LlavaTrainer, arguments: Any, checkpoint: Checkpoint, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure on all ranks, fit the attached router, put the fitted one in place.

    Args:
        trainer, checkpoint: Give the engine, the training samples and the seed; and the router.
        arguments: Flags of the stage: how much is measured, and the skip ratio to set.
        progress: Called with lines of progress, on every rank.

    Returns:
        What was found, with its cost: training samples touched, sample-passes through the decoder, seconds of wall
        time and of this process's CPU time.
    """
    started, cpu_started = time.time(), time.process_time()
    config: Any = checkpoint.model.config
    args = trainer.args
    measurer = Measurer(
        prepare_for_forward(trainer),
        trainer.train_dataset,
        trainer.data_collator,
        get_image_token_id(config),
        config.text_config.num_hidden_layers,
        CalibrationSize.from_flags(arguments),
        args.device,
        args.seed,
        progress,
    )
    decoder: Any = find_decoder(checkpoint.model)
    router, report = decoder.router.fit(measurer, arguments)
    decoder.router = router.to(args.device)
    seconds = {"seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu_started}
    return {**report, **asdict(measurer.cost), **seconds}


@dataclass
class Measurer:
    """Runs the forward passes that routers are fitted by, see ``fuzzyroe.routers.base.Measurer``.

    Attributes:
        engine: Model or engine to call, with routing attached.
        dataset, collator: Training samples, and what makes batches of them.
        image_token_id, num_layers: Of the model.
        size, device: How much to measure, and where batches go.
        seed: Seed of the choice of samples.
        progress: Called with a line of text at each step.
        cost: What the passes have cost so far.
    """

    engine: nn.Module
    dataset: Any
    collator: Any
    image_token_id: int
    num_layers: int
    size: CalibrationSize
    device: torch.device
    seed: int = 0
    progress: Callable[[str], None] = lambda line: None
    cost: Cost = field(default_factory=Cost, init=False)

    def __post_init__(self) -> None:
        is_spread = distributed.is_initialized()
        self.rank, self.world_size = (distributed.get_rank(), distributed.get_world_size()) if is_spread else (0, 1)
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed)).tolist()
        size = self.size
        # every measurement takes the first of these, so that the samples touched are as few as the largest asks for
        counts = (size.order_samples, size.calibration_samples, size.score_samples, size.budget_samples)
        self.samples = order[: max(counts)]

    def measure(self, single_layers: bool = False) -> Measurements:
        """Search the order of layers, then measure losses (``single_layers``: without each layer too) and features."""
        layer_order = self.find_order()
        batches = list(self.batches(self.size.calibration_samples))
        columns = [self.losses(batches, layer_order[:count]) for count in range(len(layer_order) + 1)]
        self.progress(f"loss by skipped layers: {[round(float(column.mean()), 3) for column in columns]}")
        layer_losses = None
        if single_layers:
            # the first layer is never skipped; its column holds the dense loss
            singles = [self.losses(batches, [layer]) for layer in range(1, self.num_layers)]
            layer_losses = torch.stack([columns[0], *singles], dim=1).double().numpy()
        return Measurements(
            tuple(FEATURES),
            self.raw_features(batches).double().numpy(),
            torch.stack(columns, dim=1).double().numpy(),
            layer_order,
            self.raw_features(self.batches(self.size.score_samples)).double().numpy(),
            layer_losses,
        )

    def find_order(self) -> list[int]:
        """Order the layers, first to be skipped first, as many as are skipped at most."""
        # The first layer sees raw embeddings and is never worth skipping (a pilot measured +3.7 nats).
        candidates = list(range(1, self.num_layers))
        max_skips = min(math.ceil(self.size.max_skip_ratio * self.num_layers - 1e-9), len(candidates))
        batches = list(self.batches(self.size.order_samples))
        self.progress(f"ordering {max_skips} of {self.num_layers} layers on {self.size.order_samples} samples")
        order = greedy_layer_order(lambda skipped: float(self.losses(batches, skipped).mean()), candidates, max_skips)
        self.progress(f"layers, first to be skipped first: {order}")
        return order

    def skip_rate(self, batches: Iterable[dict[str, Tensor]], ask: Callable[[RoutingState], None]) -> float:
        """Mean share of layers that the attached router skips, once ``ask`` has changed each batch's state."""

        def kept(batch: dict[str, Tensor], state: RoutingState, answered: Tensor) -> Tensor:
            ask(state)
            self.run_model(batch, state)
            assert state.result.keep_weights is not None
            return state.result.keep_weights[answered]

        return 1 - float(self._measure_turns(batches, kept).mean())

    def losses(self, batches: Iterable[dict[str, Tensor]], skipped: list[int]) -> Tensor:
        """Mean answer loss of every turn of every sample when some layers are skipped, (turns over all ranks,)."""
        keep = torch.ones(self.num_layers, device=self.device)
        keep[skipped] = 0.0

        def losses_of(batch: dict[str, Tensor], state: RoutingState, answered: Tensor) -> Tensor:
            logits = self.run_model(batch, state.forced(keep.expand(len(state.turn_ids), -1))).logits
            return turn_losses(logits, batch["labels"], state.turn_ids, answered.shape[1])

        return self._measure_turns(batches, losses_of)

    def raw_features(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """All raw features of every turn, in the order of ``losses``, (turns over all ranks, features), on the CPU."""

        def features_of(batch: dict[str, Tensor], state: RoutingState, answered: Tensor) -> Tensor:
            summary = summarise(self.decoder_input(batch, state), state, state.num_turns)
            return compute_features(summary, tuple(FEATURES))[answered]

        return self._measure_turns(batches, features_of)

    def batches(self, num_samples: int) -> Iterator[dict[str, Tensor]]:
        """This rank's batches of the first samples, short ones together; all ranks get equally many of equal size."""
        usable = min(num_samples, len(self.samples))
        self.cost.samples = max(self.cost.samples, usable)
        usable -= usable % self.world_size  # a rank with one batch more would wait forever under ZeRO-3
        mine = self.samples[self.rank : usable : self.world_size]
        mine = sorted(mine, key=lambda sample: abs(self.dataset.modality_length(sample)))
        return iter(DataLoader(Subset(self.dataset, mine), self.size.calibration_batch_size, collate_fn=self.collator))

    def decoder_input(self, batch: dict[str, Tensor], state: RoutingState) -> Tensor:
        """States before the first decoder layer, (B, N, D), read by a hook while the model runs without skipping."""
        seen: list[Tensor] = []
        handle = self._decoder().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        try:
            self.run_model(batch, state.forced(torch.ones(len(state.turn_ids), self.num_layers, device=self.device)))
        finally:
            handle.remove()
        return seen[0]

    def run_model(self, batch: dict[str, Tensor], state: RoutingState) -> Any:
        """Run the model on a batch, routed as its state says."""
        names = ("input_ids", "attention_mask", "pixel_values")
        inputs = {name: batch[name] for name in names if name in batch}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(next(self._decoder().parameters()).dtype)
        return self.engine(**inputs, routing=state, use_cache=False)

    def describe(self, batch: dict[str, Tensor]) -> RoutingState:
        """Give the state of a batch on the device, still to be planned; both branches of every layer will run."""
        return RoutingState.from_batch(batch, self.image_token_id, "soft")

    @torch.no_grad()
    def _measure_turns(
        self, batches: Iterable[dict[str, Tensor]], look: Callable[[dict[str, Tensor], RoutingState, Tensor], Tensor]
    ) -> Tensor:
        """Join what one pass per batch tells of its answered turns, (B, T): over all ranks, in their order, on the CPU.

        Turns without an answer, whose loss is not known, are left out of all measurements alike.
        """
        parts = []
        for batch in batches:
            batch = {name: value.to(self.device) for name, value in batch.items()}
            state = self.describe(batch)
            answered = answered_turns(batch["labels"], state.turn_ids, state.planned_turns())
            parts.append(look(batch, state, answered).float().cpu())
            self.cost.passes += len(state.turn_ids) * self.world_size
        return torch.from_numpy(np.concatenate(gather_object([torch.cat(parts).numpy()])))

    def _decoder(self) -> Any:
        return find_decoder(getattr(self.engine, "module", self.engine))
