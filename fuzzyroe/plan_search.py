"""Search for the layers whose absence hurts one known answer least: the bound that routers are measured against.

The search runs the model with hard routing, all examples of a batch at once, each under a plan of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzzyroe.attach import find_decoder
from fuzzyroe.prompt_hash import prompt_hashes
from fuzzyroe.routing_state import RoutingState

IGNORED_LABEL = -100


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


def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the mean cross-entropy of each answer in nats, (B,), from logits (B, N, V) and labels (B, N).

    Raises:
        ValueError: If an example has no label to predict.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    counts = (targets != IGNORED_LABEL).sum(dim=1)
    if (counts == 0).any():
        raise ValueError(
            f"Rows {(counts == 0).nonzero().flatten().tolist()} have no label behind their first position; a loss "
            "needs an answer. Leave them out."
        )
    return losses.sum(dim=1) / counts


@torch.no_grad()
def losses_under(model: nn.Module, batch: LabelledBatch, keep: Tensor) -> Tensor:
    """Give each answer's loss, (B,), when row b runs the layers where ``keep``, (B, L) bool, is True."""
    routing = batch.routing.forced(keep, mode="hard")
    logits = model(**{**batch.inputs, "use_cache": False}, routing=routing).logits
    return answer_losses(logits, batch.labels)


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
        found: list[dict[frozenset[int], float]] = [{} for _ in range(num_rows)]
        for place in range(max(map(len, beams))):
            for layer in candidates:
                sets = [beam[min(place, len(beam) - 1)] | {layer} for beam in beams]
                if any(layer not in beam[min(place, len(beam) - 1)] for beam in beams):
                    values = loss_of(_plan_of(sets, num_layers)).tolist()
                    for row, (skipped, value) in enumerate(zip(sets, values, strict=True)):
                        if len(skipped) == len(plans):
                            found[row][skipped] = value
        beams = [sorted(sets, key=sets.__getitem__)[:beam_width] for sets in found]
        plans.append(_plan_of([beam[0] for beam in beams], num_layers))
        losses.append(torch.tensor([sets[beam[0]] for sets, beam in zip(found, beams, strict=True)]))
    return torch.stack(plans, dim=1), torch.stack(losses, dim=1)


def search_plans(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    max_skips: int,
    beam_width: int = 1,
    candidates: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search the plans of all examples of a data set.

    Args:
        model: An attached model in eval mode.
        batches: Examples with answers.
        max_skips: Layers skipped at most, K.
        beam_width: 1 searches greedily.
        candidates: Layers that may be skipped; None allows all but the first.

    Returns:
        Prompt hashes (n,) int64, plans (n, K + 1, L) bool and losses (n, K + 1), on the CPU: what
        ``OracleRouter.from_search`` takes.

    Raises:
        ValueError: If ``max_skips`` is more than there are candidates.
    """
    num_layers = len(find_decoder(model).layers)
    candidates = range(1, num_layers) if candidates is None else candidates
    if not 0 <= max_skips <= len(candidates):
        raise ValueError(f"max_skips is {max_skips}, but {len(candidates)} layers may be skipped; ask for fewer.")
    known, plans, losses = [], [], []
    for batch in batches:
        known.append(_prompt_hashes_of(model, batch).cpu())
        device = batch.labels.device

        def loss_of(keep: Tensor, batch: LabelledBatch = batch, device: torch.device = device) -> Tensor:
            return losses_under(model, batch, keep.to(device))

        found = search_rows(loss_of, len(batch.labels), num_layers, max_skips, candidates, beam_width)
        plans.append(found[0])
        losses.append(found[1])
    return torch.cat(known), torch.cat(plans), torch.cat(losses)


def allocate_skips(losses: np.ndarray, mean_skips: float) -> np.ndarray:
    """Share a budget out among examples so that their summed loss is least.

    Each example's losses are replaced by their lower convex hull, whose pieces are taken in the order of their slopes;
    only the last piece taken may be cut.

    Args:
        losses: Loss of each example when it skips k layers, (n, K + 1).
        mean_skips: Layers skipped in the mean, in [0, K].

    Returns:
        Layers that each example skips, (n,) int64; their sum is ``mean_skips * n``, rounded.
    """
    pieces = []  # (slope, example, first number of skips, last number of skips)
    for example, row in enumerate(losses):
        start, last = 0, len(row) - 1
        while start < last:
            slopes = (row[start + 1 :] - row[start]) / np.arange(1, last - start + 1)
            stop = start + 1 + int(np.flatnonzero(slopes == slopes.min())[-1])
            pieces.append((float(slopes.min()), example, start, stop))
            start = stop
    counts = np.zeros(len(losses), dtype=np.int64)
    remaining = round(mean_skips * len(losses))
    for _, example, start, stop in sorted(pieces):
        taken = min(stop - start, remaining)
        counts[example] += taken
        remaining -= taken
    return counts


def _plan_of(sets: Sequence[frozenset[int]], num_layers: int) -> Tensor:
    keep = torch.ones(len(sets), num_layers, dtype=torch.bool)
    for row, skipped in enumerate(sets):
        keep[row, sorted(skipped)] = False
    return keep


@torch.no_grad()
def _prompt_hashes_of(model: nn.Module, batch: LabelledBatch) -> Tensor:
    """Prompt hashes of the examples, (B,), from what enters the decoder of a forward that skips nothing."""
    seen: list[Tensor] = []
    decoder = find_decoder(model)

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("inputs_embeds")
        seen.append(decoder.get_input_embeddings()(kwargs["input_ids"]) if embeddings is None else embeddings)

    handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        losses_under(model, batch, torch.ones(len(batch.labels), len(decoder.layers), device=batch.labels.device))
    finally:
        handle.remove()
    return prompt_hashes(seen[0], replace(batch.routing, mode="hard"))[:, 0]
