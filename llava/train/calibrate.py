"""FuzzyRoE's router stage: forward passes that measure, on all ranks, what a router is fitted to.

Nothing is trained. Every pass computes both branches of every layer in the same order on every rank, so it runs under
ZeRO-3; ranks measure different samples, exchange the results and fit the same router.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from fuzzyroe.budget import greedy_layer_order
from fuzzyroe.calibrate import Measurements
from fuzzyroe.features import FEATURES, compute_features, summarise
from fuzzyroe.routers.roe.schedule import Relaxation
from fuzzyroe.routers.roe.tokens import RoEPass
from fuzzyroe.routing_state import RoutingState
from llava.constants import IGNORE_INDEX

HARD_TEMPERATURE = 1e-6
"""Temperature at which soft decisions are 0 or 1."""


@dataclass(frozen=True)
class CalibrationSize:
    """How much is measured.

    Attributes:
        order_samples: Samples that the order of layers is searched on.
        loss_samples: Samples whose loss is measured at every number of skipped layers.
        score_samples: Samples whose features are measured.
        batch_size: Samples per rank and pass.
        max_skip_ratio: Share of the layers that are skipped at most, rounded up to whole layers.
        single_layers: Whether the loss without each single layer is measured too, L - 1 more passes.
        budget_samples: Samples on which linear routers are measured.
    """

    order_samples: int
    loss_samples: int
    score_samples: int
    batch_size: int
    max_skip_ratio: float
    single_layers: bool = False
    budget_samples: int = 0


@dataclass
class Cost:
    """What calibration has cost so far: samples of the training data touched, and sample-passes through the decoder."""

    samples: int = 0
    passes: int = 0


class Measurer:
    """Runs the forward passes.

    Args:
        engine: Model or engine to call, with routing attached.
        dataset: Training samples.
        collator: Makes batches of them.
        image_token_id: Token id of image positions.
        num_layers: Layers of the decoder.
        size: How much to measure.
        device: Where batches go.
        seed: Seed of the choice of samples.
        progress: Called with a line of text at each step.
    """

    def __init__(
        self,
        engine: nn.Module,
        dataset: Any,
        collator: Any,
        image_token_id: int,
        num_layers: int,
        size: CalibrationSize,
        device: torch.device,
        seed: int = 0,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.engine, self.dataset, self.collator = engine, dataset, collator
        self.image_token_id, self.num_layers, self.size, self.device = image_token_id, num_layers, size, device
        self.progress = progress
        self.cost = Cost()
        self.world_size = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.samples = order[: max(size.loss_samples, size.order_samples, size.score_samples, size.budget_samples)]

    @torch.no_grad()
    def measure(self) -> Measurements:
        """Search the order of layers, then measure losses and features."""
        layer_order = self.find_order()
        batches = list(self.batches(self.size.loss_samples))
        columns = [self._losses(batches, layer_order[:count]) for count in range(len(layer_order) + 1)]
        losses = torch.stack(columns, dim=1)
        self.progress(f"loss by skipped layers: {[round(float(column.mean()), 3) for column in columns]}")
        layer_losses = None
        if self.size.single_layers:
            singles = [self._losses(batches, [layer]) for layer in range(1, self.num_layers)]
            layer_losses = torch.stack([columns[0], *singles], dim=1).double().numpy()
        features = self._features(batches)
        score_features = self.raw_features(self.size.score_samples)
        return Measurements(
            self.feature_names,
            features.double().numpy(),
            losses.double().numpy(),
            layer_order,
            score_features.double().numpy(),
            layer_losses,
        )

    @torch.no_grad()
    def find_order(self) -> list[int]:
        """Order the layers, first to be skipped first, as many as are skipped at most."""
        # The first layer sees raw embeddings and is never worth skipping (a pilot measured +3.7 nats).
        candidates = list(range(1, self.num_layers))
        max_skips = min(math.ceil(self.size.max_skip_ratio * self.num_layers - 1e-9), len(candidates))
        batches = list(self.batches(self.size.order_samples))
        self.progress(f"ordering {max_skips} of {self.num_layers} layers on {self.size.order_samples} samples")
        order = greedy_layer_order(lambda skipped: float(self._losses(batches, skipped).mean()), candidates, max_skips)
        self.progress(f"layers, first to be skipped first: {order}")
        return order

    @torch.no_grad()
    def skip_rate(self, batches: list[dict[str, Tensor]], skip_logit_bias: float) -> float:
        """Mean share of layers that linear routers skip under a skip-logit bias.

        Both branches of every layer are computed and weighted by 0 or 1, so that all ranks do the same.
        """
        kept = []
        for batch in batches:
            state = self._describe(batch)
            state.roe = RoEPass(Relaxation(temperature=HARD_TEMPERATURE, bias=-skip_logit_bias))
            self._forward(batch, state)
            answered = answered_turns(batch["labels"].to(self.device), state.turn_ids, state.num_turns)
            kept.append(state.result.keep_weights[answered])
            self.cost.passes += state.turn_ids.shape[0] * self.world_size
        return 1 - float(self._gather(torch.cat(kept)).mean())

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the columns of raw features."""
        return tuple(FEATURES)

    @torch.no_grad()
    def raw_features(self, num_samples: int) -> Tensor:
        """Raw features of every turn of the first samples, (turns over all ranks, features), on the CPU."""
        return self._features(self.batches(num_samples))

    def batches(self, num_samples: int) -> Iterator[dict[str, Tensor]]:
        """This rank's batches of the first samples, short ones together; all ranks get equally many of equal size."""
        usable = min(num_samples, len(self.samples))
        self.cost.samples = max(self.cost.samples, usable)
        usable -= usable % self.world_size
        mine = sorted(self.samples[self.rank : usable : self.world_size], key=self._length)
        return iter(DataLoader(Subset(self.dataset, mine), self.size.batch_size, collate_fn=self.collator))

    def _length(self, sample: int) -> int:
        return abs(self.dataset.modality_length(sample))

    def _losses(self, batches: list[dict[str, Tensor]], skipped: list[int]) -> Tensor:
        """Mean answer loss of every turn of every sample when some layers are skipped, (turns over all ranks,)."""
        losses = []
        for batch in batches:
            state = self._describe(batch)
            keep = torch.ones(self.num_layers, device=self.device)
            keep[skipped] = 0.0
            state = state.forced(keep.expand(state.turn_ids.shape[0], -1))
            logits = self._forward(batch, state).logits
            losses.append(turn_losses(logits, batch["labels"].to(self.device), state.turn_ids, state.num_turns))
            self.cost.passes += state.turn_ids.shape[0] * self.world_size
        return self._gather(torch.cat(losses))

    def _features(self, batches: Any) -> Tensor:
        """All raw features of every turn, in the order of ``_losses``, (turns over all ranks, features)."""
        features = []
        for batch in batches:
            state = self._describe(batch)
            embeddings = self._decoder_input(batch, state)
            raw = compute_features(summarise(embeddings, state, state.num_turns), tuple(FEATURES))
            answered = answered_turns(batch["labels"].to(self.device), state.turn_ids, state.num_turns)
            features.append(raw[answered])
        return self._gather(torch.cat(features))

    def _decoder_input(self, batch: dict[str, Tensor], state: RoutingState) -> Tensor:
        """States before the first decoder layer, (B, N, D), read by a hook while the model runs as usual."""
        seen: list[Tensor] = []
        decoder = self._decoder()
        handle = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        state = state.forced(torch.ones(state.turn_ids.shape[0], self.num_layers, device=self.device))
        try:
            self._forward(batch, state)
        finally:
            handle.remove()
        self.cost.passes += state.turn_ids.shape[0] * self.world_size
        return seen[0]

    def _decoder(self) -> nn.Module:
        model = getattr(self.engine, "module", self.engine)
        return model.get_decoder()

    def _describe(self, batch: dict[str, Tensor]) -> RoutingState:
        moved = {key: value.to(self.device) for key, value in batch.items()}
        return RoutingState.from_batch(moved, self.image_token_id, "soft")

    def _forward(self, batch: dict[str, Tensor], state: RoutingState) -> Any:
        names = ("input_ids", "attention_mask", "pixel_values")
        inputs = {name: batch[name].to(self.device) for name in names if name in batch}
        if "pixel_values" in inputs:
            dtype = next(self._decoder().parameters()).dtype
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        return self.engine(**inputs, routing=state, use_cache=False)

    def _gather(self, values: Tensor) -> Tensor:
        """Join the rows of all ranks, in rank order, on the CPU."""
        values = values.float().cpu()
        if self.world_size == 1:
            return values
        parts: list[Any] = [None] * self.world_size
        distributed.all_gather_object(parts, values.numpy())
        return torch.from_numpy(np.concatenate(parts))


def answered_turns(labels: Tensor, turn_ids: Tensor, num_turns: int) -> Tensor:
    """Which turns have at least one learned token, (B, T) bool, from labels and turn ids (B, N)."""
    turns = torch.arange(1, num_turns + 1, device=labels.device).view(1, -1, 1)
    learned = (labels != IGNORE_INDEX).unsqueeze(1)
    return ((turn_ids.unsqueeze(1) == turns) & learned).any(dim=-1)


def turn_losses(logits: Tensor, labels: Tensor, turn_ids: Tensor, num_turns: int) -> Tensor:
    """Mean cross-entropy of each answered turn.

    Args:
        logits: (B, N, V).
        labels: (B, N).
        turn_ids: (B, N).
        num_turns: T.

    Returns:
        One loss in nats per answered turn, sample by sample, turn by turn, (turns,).
    """
    targets, turns = labels[:, 1:], turn_ids[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    learned = (targets != IGNORE_INDEX).float()
    index = turns.clamp(min=0)
    sums = torch.zeros(labels.shape[0], num_turns + 1, device=losses.device).scatter_add_(1, index, losses * learned)
    counts = torch.zeros_like(sums).scatter_add_(1, index, learned)
    answered = answered_turns(labels, turn_ids, num_turns)
    return (sums / counts.clamp(min=1))[:, 1:][answered]
