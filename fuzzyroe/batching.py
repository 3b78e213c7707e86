"""Batches of requests whose plans nearly agree.

In decoding a layer's weights are read once for the whole batch, so a layer is saved only if every row skips it; in
prefill every row saves its own, but is padded to the longest. Which requests share a batch therefore decides how much
of the skips is saved, and nothing else: every row is still routed by its own plan, so no answer depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WorkModel:
    """What a batch costs, counted in positions that pass through one layer.

    Attributes:
        new_tokens: Tokens that a request is expected to be answered with, at least 1.
        positions_per_read: Positions that a layer computes in the time in which its weights are read: the ratio of
            arithmetic to memory bandwidth, about 10 on a CPU core in float32 and 150 on a data-centre GPU in bfloat16.
    """

    new_tokens: int = 16
    positions_per_read: float = 32.0

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.positions_per_read < 0:
            raise ValueError(
                f"WorkModel got new_tokens={self.new_tokens} and positions_per_read={self.positions_per_read}; answers "
                "have at least 1 token, and the ratio is not negative. Correct them."
            )

    def work(self, plans: Tensor, lengths: Tensor) -> float:
        """Work of one batch.

        Every row pays for the longest prompt in the layers it keeps; each step of decoding pays for reading the layers
        that any row keeps, and for the rows that run them.

        Args:
            plans: True where the request runs the layer, (B, L) bool.
            lengths: Positions of each prompt, (B,) int64.
        """
        kept, read = int(plans.sum()), int(plans.any(dim=0).sum())
        decode = max(self.new_tokens - 1, 0) * (read * self.positions_per_read + kept)
        return float(int(lengths.max()) * kept + decode)


def form_batches(
    plans: Tensor, lengths: Sequence[int], batch_size: int, model: WorkModel | None = None
) -> list[list[int]]:
    """Order a queue by planned skip rate and cut it into batches.

    The queue is cut into 1, 2, 4, ... groups of similar prompt length, and each group is ordered by the layers that its
    requests keep, the most first; of these orders the one of least work is taken. Nested plans that keep equally many
    layers are equal, so neighbours differ by few.

    Args:
        plans: True where the request runs the layer, (n, L) bool; or planned skip rates, (n,), for plans that are
            nested, where only the number of layers matters.
        lengths: Positions of each prompt, images included, n of them.
        batch_size: Requests per batch, at least 1; the last batches may have fewer.
        model: What a batch costs; None takes the defaults.

    Returns:
        Indices of the requests of each batch; each request is in one.

    Raises:
        ValueError: If the sizes do not fit.
    """
    plans = _as_plans(plans.detach().cpu())
    _check(plans, lengths, batch_size)
    model, sizes = model or WorkModel(), torch.tensor(list(lengths), dtype=torch.long)
    if len(sizes) == 0:
        return []
    best: tuple[float, list[list[int]]] | None = None
    num_groups = 1
    while num_groups == 1 or num_groups * batch_size <= len(sizes):
        batches = _cut(plans, sizes, batch_size, num_groups)
        work = sum(model.work(plans[batch], sizes[batch]) for batch in batches)
        if best is None or work < best[0]:
            best = (work, batches)
        num_groups *= 2
    return best[1]


def _as_plans(plans: Tensor) -> Tensor:
    """Nested plans with the given skip rates, to a thousandth; plans pass unchanged."""
    if plans.dim() != 1:
        return plans
    steps = 1000
    return torch.arange(steps) >= (plans.double().clamp(0, 1) * steps).round().unsqueeze(1)  # (n, steps)


def _cut(plans: Tensor, lengths: Tensor, batch_size: int, num_groups: int) -> list[list[int]]:
    """Batches of requests from one group each, in the order of their plans, then of their lengths."""
    by_length = sorted(range(len(lengths)), key=lambda index: (-int(lengths[index]), index))
    # groups are whole numbers of batches, so that only the last batch of all is smaller
    num_batches = -(-len(by_length) // batch_size)
    patterns = [tuple(row) for row in plans.tolist()]
    counts = [sum(pattern) for pattern in patterns]
    batches = []
    for group in range(num_groups):
        first, last = (num_batches * number // num_groups * batch_size for number in (group, group + 1))
        ordered = sorted(
            by_length[first:last],
            key=lambda index: (counts[index], patterns[index], int(lengths[index])),
            reverse=True,
        )
        batches += [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return batches


def _check(plans: Tensor, lengths: Sequence[int], batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 request. Give a number from 1.")
    if plans.dim() != 2 or len(plans) != len(lengths):
        raise ValueError(
            f"plans is {tuple(plans.shape)} for {len(lengths)} prompts; give one row of layers, or one skip rate, for "
            "each prompt."
        )
    if any(length < 1 for length in lengths):
        raise ValueError(f"The shortest prompt has {min(lengths)} positions; a prompt has at least 1. Drop empty ones.")
