"""Budgets: from a target skip ratio to the layers that each example skips.

Nested plans: layers stand in one order, first to be skipped first; an example's score decides only *how many* of them
it skips, so that a higher score keeps a superset of layers. The number is a step function of the score's percentile,
found bin by bin by the least marginal loss on calibration data. Percentiles are uniform, so the mean skip rate of a
table is the mean of its thresholds, and any target between two rows is met by interpolation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BudgetTable:
    """Thresholds for growing budgets.

    Attributes:
        ratios: Mean skip rates, increasing from 0, (G,).
        thresholds: Layer l is skipped iff an example's score percentile lies below its threshold, (G, L) in [0, 1].
    """

    ratios: np.ndarray
    thresholds: np.ndarray


def greedy_layer_order(loss_of: Callable[[list[int]], float], candidates: Sequence[int], length: int) -> list[int]:
    """Order ``length`` layers by how little loss skipping them adds, one greedy step after the other.

    Args:
        loss_of: Mean loss when a list of layers is skipped.
        candidates: Layers that may be skipped.
        length: How many to order.

    Reference:
        SLEB (arXiv:2402.09025) removes blocks in this manner.
    """
    order: list[int] = []
    for _ in range(min(length, len(candidates))):
        remaining = [layer for layer in candidates if layer not in order]
        losses = [loss_of([*order, layer]) for layer in remaining]
        order.append(remaining[int(np.argmin(losses))])
    return order


def allocate(
    losses: np.ndarray, percentiles: np.ndarray, layer_order: list[int], num_layers: int, num_bins: int = 8
) -> BudgetTable:
    """Decide how many layers each score bin skips, as the budget grows.

    At every step the bin whose next skip adds the least mean loss takes it, as long as a lower bin never skips fewer
    layers than a higher one. Bins are believed to differ only as far as their examples show it, see ``shrinkage``:
    where scores tell nothing, all examples skip as many layers, or one more.

    Args:
        losses: Loss of each example when the first k layers of the order are skipped, (n, K + 1), k = 0..K.
        percentiles: Score percentile of each example, in [0, 1], (n,).
        layer_order: Layers, first to be skipped first, at least K.
        num_layers: Layers of the decoder, L.
        num_bins: Bins of equal mass.

    Returns:
        A table of ``num_bins * K + 1`` budgets up to K / L.

    Raises:
        ValueError: If a bin has no example.
    """
    max_skips = losses.shape[1] - 1
    bins = np.minimum((percentiles * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    if counts.min() == 0:
        raise ValueError(
            f"Score bin {int(counts.argmin())} of {num_bins} holds none of the {len(bins)} calibration examples; give "
            "more examples, or fewer bins."
        )
    mean_losses = np.stack([losses[bins == index].mean(axis=0) for index in range(num_bins)])  # (bins, K + 1)
    overall = mean_losses.mean(axis=0)
    # few examples to a bin: what their means differ by chance must not buy one bin deep skips
    mean_losses = overall + shrinkage(losses, bins) * (mean_losses - overall)
    skips = np.zeros(num_bins, dtype=int)
    rows = [np.zeros(num_layers)]
    while skips.min() < max_skips:
        # A bin may go as deep as the bin below it. Looking ahead by more than one steps over a bad layer in the order.
        reach = np.concatenate([[max_skips], skips[:-1]]) - skips
        steps = [(index, depth) for index in range(num_bins) for depth in range(1, reach[index] + 1)]
        increases = [(mean_losses[b, skips[b] + depth] - mean_losses[b, skips[b]]) / depth for b, depth in steps]
        chosen, depth = steps[int(np.argmin(increases))]
        for _ in range(depth):
            skips[chosen] += 1
            # bins skip non-increasing numbers of layers, so each layer is skipped below a share of the bins
            row = np.zeros(num_layers)
            row[layer_order[:max_skips]] = (skips > np.arange(max_skips)[:, None]).mean(axis=1)
            rows.append(row)
    thresholds = np.stack(rows)
    return BudgetTable(thresholds.mean(axis=1), thresholds)


def shrinkage(losses: np.ndarray, bins: np.ndarray) -> float:
    """Share of the differences between bins that is not explained by which examples fell into them.

    With y the mean loss increase of an example, it is ``1 - noise / spread``, at least 0: the spread is the variance of
    the bins' mean y, the noise the variance that these means would have if all bins were alike.

    Args:
        losses: Loss of each example when the first k layers of an order are skipped, (n, K + 1).
        bins: Bin of each example, from 0, none empty, (n,).

    Returns:
        In [0, 1]; 0 if there are no more examples than bins.

    Reference:
        The shrinkage of James and Stein, with the variance between groups estimated by moments.
    """
    increase = (losses[:, 1:] - losses[:, :1]).mean(axis=1)
    counts = np.bincount(bins)
    if len(increase) <= len(counts):
        return 0.0
    means = np.bincount(bins, increase) / counts
    within = np.square(increase - means[bins]).sum() / (len(increase) - len(counts))
    noise, spread = within * float(np.mean(1 / counts)), float(means.var(ddof=1)) if len(counts) > 1 else 0.0
    return float(np.clip(1 - noise / spread, 0, 1)) if spread > 0 else 0.0


def allocate_skips(losses: np.ndarray, mean_skips: float) -> np.ndarray:
    """Share a budget out among examples whose losses are known, so that their summed loss is least.

    Each example's losses are replaced by their lower convex hull, whose pieces are taken in the order of their slopes;
    only the last piece taken may be cut.

    Args:
        losses: Loss of each example when it skips k layers, (n, K + 1).
        mean_skips: Layers skipped on average, in [0, K].

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
    # pieces of one example have rising slopes, so sorting all of them keeps each example's own order
    for _, example, start, stop in sorted(pieces):
        taken = min(stop - start, remaining)
        counts[example] += taken
        remaining -= taken
    return counts
