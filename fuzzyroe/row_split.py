"""The split of a batch into rows that run a layer and rows that skip it."""

from __future__ import annotations

import torch
from torch import Tensor


class RowSplit:
    """One decision per row of a batch, held on the host so that asking it never waits for a device.

    Args:
        keep: True where the row runs the layer, (B,) bool on the CPU.
    """

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self.num_rows = keep.shape[0]
        self.num_kept = sum(keep.tolist())
        self._rows: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def all_kept(self) -> bool:
        """Whether every row runs the layer."""
        return self.num_kept == self.num_rows

    @property
    def none_kept(self) -> bool:
        """Whether every row skips the layer."""
        return self.num_kept == 0

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give the indices of the kept and of the skipped rows, copied to ``device`` once.

        Returns:
            Kept rows, (num_kept,) int64, and skipped rows, (B - num_kept,) int64, both ascending.
        """
        if device not in self._rows:
            kept, skipped = self.keep.nonzero().flatten(), (~self.keep).nonzero().flatten()
            self._rows[device] = (kept.to(device), skipped.to(device))
        return self._rows[device]
