"""The split of a batch into rows that run a layer and rows that skip it."""

from __future__ import annotations

import torch
from torch import Tensor


class RowSplit:
    """One decision per row of a batch, held on the host so that asking it never waits for a device.

    Args:
        keep: True where the row runs the layer, (B,) bool on the CPU.

    Attributes:
        num_rows: Batch size B.
        num_kept: Rows that run the layer.
        all_kept, none_kept: Whether every row does, and whether none does.
    """

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self.num_rows = keep.shape[0]
        self.num_kept = sum(keep.tolist())
        self.all_kept = self.num_kept == self.num_rows
        self.none_kept = self.num_kept == 0
        self._rows: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._slots: dict[torch.device, Tensor] = {}

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give the indices of the kept and of the skipped rows, copied to ``device`` once.

        Returns:
            Kept rows, (num_kept,) int64, and skipped rows, (B - num_kept,) int64, both ascending.
        """
        if device not in self._rows:
            kept, skipped = self.keep.nonzero().flatten(), (~self.keep).nonzero().flatten()
            self._rows[device] = (kept.to(device), skipped.to(device))
        return self._rows[device]

    def slots(self, device: torch.device) -> Tensor:
        """Give where each row stands among the kept ones, (B,) int64 on ``device``; B for a row that skips."""
        if device not in self._slots:
            slots = torch.where(self.keep, self.keep.cumsum(dim=0) - 1, self.num_rows)
            self._slots[device] = slots.to(device)
        return self._slots[device]
