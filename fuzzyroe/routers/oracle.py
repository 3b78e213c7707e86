"""The oracle: for prompts whose answer is known, the layers whose absence hurts that answer least.

It is the bound that routers are measured against. The search runs the model with hard routing, all examples of a batch
at once, each under a plan of its own; the router replays what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzzyroe.budget import allocate_skips
from fuzzyroe.losses import IGNORED_LABEL, sample_losses
from fuzzyroe.prompt_hash import prompt_hashes
from fuzzyroe.routers.base import Router
from fuzzyroe.routing_state import RoutingState


class OracleRouter(Router):
    """A bound, not a policy: it knows the prompts of a test set by their hashes and their best plans by search.

    A target is shared out among the known prompts so that their summed loss is least. A prompt that it does not know is
    refused.

    Args:
        num_prompts: Known prompts, n.
        max_skips: Layers that a plan skips at most, K.
        num_layers: Layers of the decoder, L.
        target_skip_ratio: Mean skip rate planned for by default.

    Attributes:
        known: Hashes of the prompts, ascending, (n,) int64.
        plans: True where the layer runs when a prompt skips k layers, (n, K + 1, L) bool.
        losses: Loss of the answer under that plan, (n, K + 1).

    Reference:
        Duo-LLM reports trained routers beside such an oracle.
    """

    stays_in_float32 = True  # losses of neighbouring plans differ by little
    option_names = ("num_prompts", "max_skips", "target_skip_ratio")
    known: Tensor
    plans: Tensor
    losses: Tensor

    def __init__(self, num_prompts: int, max_skips: int, num_layers: int, target_skip_ratio: float = 0.0) -> None:
        super().__init__()
        self.num_prompts, self.max_skips, self.num_layers = num_prompts, max_skips, num_layers
        self.register_buffer("known", torch.zeros(num_prompts, dtype=torch.int64))
        self.register_buffer("plans", torch.ones(num_prompts, max_skips + 1, num_layers, dtype=torch.bool))
        self.register_buffer("losses", torch.zeros(num_prompts, max_skips + 1))
        self.set_skip_rate(target_skip_ratio)

    @classmethod
    def from_search(cls, known: Tensor, plans: Tensor, losses: Tensor) -> OracleRouter:
        """Make a router of what ``search_plans`` gave; of a prompt that was searched twice, one result is taken."""
        known, first = (torch.from_numpy(part) for part in np.unique(known.cpu().numpy(), return_index=True))
        router = cls(len(known), plans.shape[1] - 1, plans.shape[2])
        router.known.copy_(known)
        router.plans.copy_(plans[first])
        router.losses.copy_(losses[first])
        return router

    @property
    def max_skip_ratio(self) -> float:
        """As deep as the search went."""
        return self.max_skips / self.num_layers

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        """Look the plan of each question up; the weights of an unknown one are nan, which hard routing refuses."""
        hashes = prompt_hashes(hidden_states, routing)  # (B, T)
        index = torch.searchsorted(self.known, hashes).clamp(max=self.num_prompts - 1)
        ratios = self.requested_ratios(routing, torch.device("cpu")).double().expand(hashes.shape[0], 1)
        losses = self.losses.double().cpu().numpy()
        # each ratio that is asked for gives every known prompt a number of skips, (n,) int64
        skips = {
            ratio: torch.from_numpy(allocate_skips(losses, ratio * self.num_layers))
            for ratio in set(ratios.flatten().tolist())
        }
        counts = torch.stack([skips[ratio] for ratio in ratios.flatten().tolist()]).to(hashes.device)  # (B, n)
        keep = self.plans[index, counts.gather(1, index)].float()  # (B, T, L)
        is_unknown = (self.known[index] != hashes).unsqueeze(-1)
        routing.result.keep_weights = keep.masked_fill(is_unknown, torch.nan)


@dataclass(frozen=True)
class LabelledBatch:
    """Examples with their answers.

    Attributes:
        inputs: Keyword inputs of the model: ``input_ids`` (B, N), ``attention_mask`` and what else it takes.
        labels: Token ids of the answers, (B, N); -100 elsewhere.
        routing: Where turns, images and questions are, one turn per example; answers are no part of a question.
    """

    inputs: dict[str, Any]
    labels: Tensor
    routing: RoutingState


def search_plans(
    model: Any,
    batches: Iterable[LabelledBatch],
    max_skips: int,
    beam_width: int = 1,
    candidates: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search the plans of all examples of a data set.

    Args:
        model: An attached model in eval mode, with ``get_decoder()``.
        batches: Examples with answers.
        max_skips: Layers skipped at most, K.
        beam_width: 1 searches greedily.
        candidates: Layers that may be skipped; None allows all but the first.

    Returns:
        Hashes of the prompts (n,) int64, plans (n, K + 1, L) bool and losses (n, K + 1), on the CPU: what
        ``OracleRouter.from_search`` takes.
    """
    num_layers = len(model.get_decoder().layers)
    candidates = range(1, num_layers) if candidates is None else candidates
    if not 0 <= max_skips <= len(candidates):
        raise ValueError(f"max_skips is {max_skips}, but {len(candidates)} layers may be skipped; ask for fewer.")
    parts = []
    for batch in batches:

        def loss_of(keep: Tensor, batch: LabelledBatch = batch) -> Tensor:
            return losses_under(model, batch, keep.to(batch.labels.device))

        hashes = _hashes_of(model, batch).cpu()
        parts.append((hashes, *search_rows(loss_of, len(hashes), num_layers, max_skips, candidates, beam_width)))
    known, plans, losses = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return known, plans, losses


def search_rows(
    loss_of: Callable[[Tensor], Tensor],
    num_rows: int,
    num_layers: int,
    max_skips: int,
    candidates: Sequence[int],
    beam_width: int = 1,
) -> tuple[Tensor, Tensor]:
    """Search, for each row, a set of k layers to skip, for k = 0 to ``max_skips``.

    Every step skips one layer more than the best ``beam_width`` sets of the step before; width 1 is the greedy search,
    whose sets are nested.

    Args:
        loss_of: Losses (B,) under plans (B, L) bool; called up to ``beam_width`` x candidates times a step.
        num_rows: B.
        num_layers: L.
        max_skips: K, at most the number of candidates.
        candidates: Layers that may be skipped.
        beam_width: Sets kept for each row.

    Returns:
        Plans, (B, K + 1, L) bool, True where the layer runs, and their losses, (B, K + 1), on the CPU.
    """
    dense = torch.ones(num_rows, num_layers, dtype=torch.bool)
    beams: list[list[frozenset[int]]] = [[frozenset()] for _ in range(num_rows)]
    plans, losses = [dense], [loss_of(dense).float().cpu()]
    for _ in range(max_skips):
        tried: list[dict[frozenset[int], float]] = [{} for _ in range(num_rows)]
        # all rows extend the beam of one rank by one layer at once, so that a pass serves the whole batch
        for rank in range(max(map(len, beams))):
            for layer in candidates:
                sets = [beam[min(rank, len(beam) - 1)] | {layer} for beam in beams]
                if any(layer not in beam[min(rank, len(beam) - 1)] for beam in beams):
                    values = loss_of(_plan_of(sets, num_layers)).tolist()
                    for row, (skipped, value) in enumerate(zip(sets, values, strict=True)):
                        if len(skipped) == len(plans):
                            tried[row][skipped] = value
        beams = [sorted(sets, key=sets.__getitem__)[:beam_width] for sets in tried]
        plans.append(_plan_of([beam[0] for beam in beams], num_layers))
        losses.append(torch.tensor([sets[beam[0]] for sets, beam in zip(tried, beams, strict=True)]))
    return torch.stack(plans, dim=1), torch.stack(losses, dim=1)


@torch.no_grad()
def losses_under(model: Any, batch: LabelledBatch, keep: Tensor) -> Tensor:
    """Give each answer's loss, (B,), when row b runs the layers where ``keep``, (B, L) bool, is True."""
    routing = batch.routing.forced(keep, mode="hard")
    logits = model(**{**batch.inputs, "use_cache": False}, routing=routing).logits
    return answer_losses(logits, batch.labels)


def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the mean cross-entropy of each answer in nats, (B,), from logits (B, N, V) and labels (B, N).

    Raises:
        ValueError: If an example has no label to predict.
    """
    is_empty = (labels[:, 1:] == IGNORED_LABEL).all(dim=1)
    if is_empty.any():
        raise ValueError(
            f"Rows {is_empty.nonzero().flatten().tolist()} have no label behind their first position; a loss needs an "
            "answer. Leave them out."
        )
    return sample_losses(logits, labels)


def _plan_of(sets: Sequence[frozenset[int]], num_layers: int) -> Tensor:
    keep = torch.ones(len(sets), num_layers, dtype=torch.bool)
    for row, skipped in enumerate(sets):
        keep[row, sorted(skipped)] = False
    return keep


@torch.no_grad()
def _hashes_of(model: Any, batch: LabelledBatch) -> Tensor:
    """Hashes of the examples, (B,), from what enters the decoder of a forward that skips nothing."""
    seen: list[Tensor] = []
    decoder = model.get_decoder()

    def look(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("inputs_embeds")
        seen.append(decoder.get_input_embeddings()(kwargs["input_ids"]) if embeddings is None else embeddings)

    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        losses_under(model, batch, torch.ones(len(batch.labels), len(decoder.layers), device=batch.labels.device))
    finally:
        handle.remove()
    return prompt_hashes(seen[0], batch.routing)[:, 0]
