"""Nested plans: which layers a score percentile skips, for any requested mean skip rate.

Layers stand in one order, first to be skipped first; an example's score decides only *how many* of them it skips, so
that a higher score keeps a superset of layers. The number is a step function of the score's percentile, found bin by
bin by the least marginal loss on calibration data. Percentiles are uniform, so the mean skip rate of a table is the
mean of its thresholds, and any rate between two steps is met by interpolation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BudgetTable:
    """Thresholds for growing budgets.

    Attributes:
        skip_rates: Mean skip rates, increasing from 0, (G,).
        thresholds: Layer l is skipped iff an example's score percentile lies below its threshold, (G, L) in [0, 1].
    """

    skip_rates: np.ndarray
    thresholds: np.ndarray

    def thresholds_for(self, skip_rate: float) -> np.ndarray:
        """Thresholds whose mean is ``skip_rate``, (L,).

        Raises:
            ValueError: If the rate lies outside the calibrated range.
        """
        if not 0 <= skip_rate <= self.skip_rates[-1] + 1e-6:  # a router keeps its rates in float32
            raise ValueError(
                f"Skip rate {skip_rate} lies outside the calibrated range [0, {self.skip_rates[-1]:.3f}]; choose one "
                "inside, or calibrate with a larger max_skip_ratio."
            )
        return np.array([np.interp(skip_rate, self.skip_rates, column) for column in self.thresholds.T])


def greedy_layer_order(loss_of: Callable[[list[int]], float], candidates: list[int], length: int) -> list[int]:
    """Order layers by how little loss skipping them adds, one greedy step after the other.

    Args:
        loss_of: Mean loss when a list of layers is skipped.
        candidates: Layers that may be skipped.
        length: How many to order.

    Returns:
        Layers, first to be skipped first, ``length`` of them.

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
    layers than a higher one. Bins are believed to differ only as far as their examples show it, see ``trust_in_bins``:
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
    mean_losses = overall + trust_in_bins(losses, bins) * (mean_losses - overall)
    skips = np.zeros(num_bins, dtype=int)
    tables = [np.zeros(num_layers)]
    while skips.min() < max_skips:
        allowed = [b for b in range(num_bins) if skips[b] < max_skips and (b == 0 or skips[b] < skips[b - 1])]
        chosen, depth = min(
            ((b, d) for b in allowed for d in range(1, _reach(skips, b, max_skips) + 1)),
            key=lambda step: _mean_increase(mean_losses[step[0]], skips[step[0]], step[1]),
        )
        for _ in range(depth):
            skips[chosen] += 1
            tables.append(_thresholds(skips, layer_order, num_layers))
    thresholds = np.stack(tables)
    return BudgetTable(thresholds.mean(axis=1), thresholds)


def trust_in_bins(losses: np.ndarray, bins: np.ndarray) -> float:
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


def _reach(skips: np.ndarray, index: int, max_skips: int) -> int:
    """How many more layers a bin may skip before it would pass the bin below it."""
    return (max_skips if index == 0 else skips[index - 1]) - skips[index]


def _mean_increase(mean_losses: np.ndarray, skips: int, depth: int) -> float:
    """Loss added per layer by skipping ``depth`` more; looking ahead steps over a single bad layer in the order."""
    return float(mean_losses[skips + depth] - mean_losses[skips]) / depth


def _thresholds(skips: np.ndarray, layer_order: list[int], num_layers: int) -> np.ndarray:
    """Bins skip non-increasing numbers of layers, so layer order[j] is skipped below a share of the bins."""
    thresholds = np.zeros(num_layers)
    for position, layer in enumerate(layer_order):
        thresholds[layer] = np.mean(skips > position)
    return thresholds
