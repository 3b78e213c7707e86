"""Skip targets of single sources: the interval that training draws the budgets of their samples from.

A source with target t draws uniformly from the widest interval within [0, max_skip_ratio] that is centred on t, so the
mean of its budgets is t; other sources draw from all of [0, max_skip_ratio].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class SourceTargets:
    """The interval that each sample of a batch draws its budget from.

    Args:
        targets: Target of each source that has one, in [0, ``max_skip_ratio``].
        max_skip_ratio: Largest budget.
        source_of: Gives the source of a sample by its index.
    """

    def __init__(self, targets: dict[str, float], max_skip_ratio: float, source_of: Callable[[int], str]) -> None:
        self.max_skip_ratio = max_skip_ratio
        self.source_of = source_of
        self.intervals = {source: centred_interval(target, max_skip_ratio) for source, target in targets.items()}

    def intervals_of(self, sample_index: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest budget of samples, by their indices (B,); (B,) each, on the CPU."""
        anywhere = (0.0, self.max_skip_ratio)
        rows = [self.intervals.get(self.source_of(index), anywhere) for index in sample_index.tolist()]
        return torch.tensor(rows).unbind(dim=1)


def centred_interval(target: float, highest: float) -> tuple[float, float]:
    """The widest interval within [0, ``highest``] whose middle is ``target``."""
    reach = min(target, highest - target)
    return target - reach, target + reach
