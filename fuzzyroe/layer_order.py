"""Orders of layers, first to be skipped first, from forward passes over a few examples.

All criteria look at the dense model, or at losses of the model with its adapters; none needs a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuzzyroe.attach import find_decoder, is_attached
from fuzzyroe.budget import greedy_layer_order
from fuzzyroe.plan_search import LabelledBatch, losses_under
from fuzzyroe.routing_state import RoutingState


def block_influence(model: nn.Module, batches: Iterable[LabelledBatch]) -> np.ndarray:
    """Measure how much each layer turns the states of its tokens: ``1 - mean cosine of input and output``.

    Args:
        model: A model in eval mode, attached or not.
        batches: Examples; labels are not looked at.

    Returns:
        Influence of each layer, in [0, 2], (L,); the lowest is skipped first.

    Reference:
        ShortGPT (arXiv:2403.03853), "Block Influence".
    """

    layers = find_decoder(model).layers
    sums, counts = np.zeros(len(layers)), np.zeros(len(layers))

    def look(index: int, is_token: Tensor, inputs: Tensor, output: Any) -> None:
        cosines = F.cosine_similarity(inputs.float(), output.float(), dim=-1)[is_token]
        sums[index] += float((1 - cosines.double()).sum())
        counts[index] += len(cosines)

    _observe(model, batches, layers, look)
    return sums / counts


def attention_rank(model: nn.Module, batches: Iterable[LabelledBatch], tolerance: float = 0.01) -> np.ndarray:
    """Measure the rank of each layer's attention maps, as a share of their size, mean over heads and examples.

    A map of low rank mixes tokens in few ways, so that its layer is worth little.

    Args:
        model: A model in eval mode with ``attn_implementation="eager"``, the only one that gives maps.
        batches: Examples; labels are not looked at.
        tolerance: Singular values below this share of the largest count as zero.

    Returns:
        Rank of each layer in (0, 1], (L,); the lowest is skipped first.

    Raises:
        ValueError: If attention gives no maps.

    Reference:
        gamma-MoD (arXiv:2410.13859) picks layers by the rank of their attention maps; the relative tolerance is ours,
        since a causal softmax is never singular exactly.
    """
    layers = find_decoder(model).layers
    ranks: list[list[float]] = [[] for _ in layers]

    def look(index: int, is_token: Tensor, inputs: Tensor, output: tuple) -> None:
        if output[1] is None:
            raise ValueError(
                "Attention gave no maps; their rank needs attn_implementation='eager'. Load the model with it, or call "
                "set_attn_implementation('eager')."
            )
        for maps, own in zip(output[1].float(), is_token, strict=True):  # (heads, N, N) and (N,) of one example
            ranks_of_heads = torch.linalg.matrix_rank(maps[:, own][:, :, own], rtol=tolerance)
            ranks[index].append(float(ranks_of_heads.float().mean() / own.sum()))

    _observe(model, batches, [layer.self_attn for layer in layers], look)
    return np.array([np.mean(values) for values in ranks])


def order_by(values: Sequence[float], candidates: Sequence[int] | None = None) -> list[int]:
    """Order layers by a criterion, lowest first.

    Args:
        values: One value per layer, (L,).
        candidates: Layers that may be skipped; None allows all but the first.
    """
    candidates = range(1, len(values)) if candidates is None else candidates
    return sorted(candidates, key=lambda layer: float(values[layer]))


def perplexity_order(
    model: nn.Module, batches: Sequence[LabelledBatch], length: int, candidates: Sequence[int] | None = None
) -> list[int]:
    """Order layers by how little their absence adds to the loss of the answers, one greedy step after the other.

    Args:
        model: An attached model in eval mode; its adapters stand in for what is skipped.
        batches: Examples with answers, gone through ``length * L`` times.
        length: How many layers to order.
        candidates: Layers that may be skipped; None allows all but the first.

    Reference:
        SLEB (arXiv:2402.09025), greedy removal by perplexity.
    """
    num_layers = len(find_decoder(model).layers)

    def loss_of(skipped: list[int]) -> float:
        losses = []
        for batch in batches:
            keep = torch.ones(len(batch.labels), num_layers, dtype=torch.bool, device=batch.labels.device)
            keep[:, skipped] = False
            losses.append(losses_under(model, batch, keep))
        return float(torch.cat(losses).mean())

    return greedy_layer_order(loss_of, list(range(1, num_layers) if candidates is None else candidates), length)


def _observe(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    modules: Iterable[nn.Module],
    look: Callable[[int, Tensor, Tensor, Any], None],
) -> None:
    """Run batches without skipping and call ``look(index, is_token, inputs, output)`` for each module that has run."""
    masks: list[Tensor] = []

    def hook(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        look(index, masks[-1].to(inputs.device), inputs, output)

    handles = [
        module.register_forward_hook(functools.partial(hook, index), with_kwargs=True)
        for index, module in enumerate(modules)
    ]
    try:
        for batch in batches:
            masks.append(_tokens_of(batch))
            _run_dense(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run_dense(model: nn.Module, batch: LabelledBatch) -> None:
    inputs = {**batch.inputs, "use_cache": False}
    if is_attached(model):
        is_token = _tokens_of(batch)
        keep = torch.ones(len(is_token), len(find_decoder(model).layers), device=is_token.device)
        inputs["routing"] = RoutingState.from_batch({"attention_mask": is_token}).forced(keep)
    model(**inputs)


def _tokens_of(batch: LabelledBatch) -> Tensor:
    """True at positions that are no padding, (B, N) bool."""
    return batch.routing.turn_ids >= 0
