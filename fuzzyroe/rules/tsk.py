"""Zero-order TSK inference as a torch module: firing strengths times consequents.

With ramps ``r_k = clip((x - p_k) / (p_{k+1} - p_k), 0, 1)`` the membership of term k is ``r_{k-1} - r_k``; firing
strengths are the products over the features, they sum to one, and the output ``phi @ consequents`` is the multilinear
interpolation of the table. There is no data-dependent control flow, so the module exports, runs on ``meta`` and never
waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fuzzyroe.rules.rule_base import FuzzyRuleBase

OUT_OF_REACH = 1e30


class ZeroOrderTSK(nn.Module):
    """A compiled rule base.

    Arithmetic runs in float32, or in float64 for float64 features. The tables keep their precision when the model
    around them is cast to half precision: rounding knots to bfloat16 would cost up to 6e-3 of the output.

    Attributes:
        knots: Peaks per feature, (K, terms); features with fewer terms are padded with peaks that no value gets near.
        consequents: One output per rule, (R,), or several, (R, outputs); rules in row-major order of the table.
        term_counts: Number of terms per feature.
        non_finite: Output of an example with a nan or infinite feature.

    Reference:
        Takagi and Sugeno, IEEE SMC-15(1), 1985; the same function class as lattices in Gupta et al., JMLR 17(109),
        2016.
    """

    knots: Tensor
    consequents: Tensor

    def __init__(
        self, peaks: Sequence[Sequence[float]], consequents: Tensor | np.ndarray, non_finite: float = 1.0
    ) -> None:
        """Hold the tables.

        Args:
            peaks: Strictly increasing peaks per feature, K sequences of two or more numbers.
            consequents: One row per rule, (R,) or (R, outputs), R = product of the numbers of terms.
            non_finite: Output of an example with a nan or infinite feature.
        """
        super().__init__()
        self.term_counts = tuple(len(row) for row in peaks)  # knots are padded, so they do not tell
        self.non_finite = float(non_finite)
        table = torch.as_tensor(consequents).detach().to(torch.float32).clone()
        if table.ndim not in (1, 2) or len(table) != math.prod(self.term_counts):
            raise ValueError(
                f"consequents have shape {tuple(table.shape)}; ({math.prod(self.term_counts)},) or "
                f"({math.prod(self.term_counts)}, outputs) is allowed for terms {self.term_counts}; complete the "
                "table first."
            )
        self.register_buffer("knots", _pad_peaks(peaks))
        self.register_buffer("consequents", table)

    @classmethod
    def from_rule_base(cls, rule_base: FuzzyRuleBase) -> ZeroOrderTSK:
        """Take the tables of a complete rule base as they are; ``skfuzzy_bridge.compile_rule_base`` checks them.

        Raises:
            ValueError: If a combination of terms has no rule.
        """
        if not rule_base.is_complete:
            raise ValueError(
                f"Rule base '{rule_base.name}' has no rule for {rule_base.missing_cells()}; inference needs one for "
                "every combination of terms; call interpolate() first."
            )
        peaks = [variable.peaks for variable in rule_base.antecedents]
        return cls(peaks, rule_base.output_table.ravel(), rule_base.non_finite)

    @property
    def num_features(self) -> int:
        """Number of features K."""
        return len(self.term_counts)

    def firing_strengths(self, features: Tensor) -> Tensor:
        """Fire all rules of features (..., K): products of memberships, (..., R).

        They sum to one, but are all zero for an example with a non-finite feature. Outside the outer knots a feature
        acts like the knot.
        """
        features, is_broken = self._guard(features)
        return self._fire(features).masked_fill(is_broken.unsqueeze(-1), 0.0)

    def forward(self, features: Tensor) -> Tensor:
        """Infer outputs, (...,) or (..., outputs), of features (..., K), in float32 (float64 for float64 features)."""
        features, is_broken = self._guard(features)
        firing, table = self._fire(features), self.consequents.to(features.dtype)
        if features.is_cuda:  # a matrix product would follow the flags of TF32, which training sets
            by_column = (firing.unsqueeze(-1) * table.view(len(table), -1)).sum(dim=-2)
            outputs = by_column if table.ndim == 2 else by_column.squeeze(-1)
        else:
            outputs = firing @ table
        is_broken = is_broken if self.consequents.ndim == 1 else is_broken.unsqueeze(-1)
        return outputs.masked_fill(is_broken, self.non_finite)

    def _guard(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Cast, and zero non-finite features *before* the arithmetic, so that gradients stay finite; say which rows."""
        if features.shape[-1] != self.num_features:
            raise ValueError(
                f"The features have shape {tuple(features.shape)}; (..., {self.num_features}) is allowed; compute the "
                "features that this rule base names."
            )
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        is_broken = ~(features.abs().amax(dim=-1) < math.inf)  # nan included; fewer kernels than isfinite().all()
        return features.nan_to_num(0.0, 0.0, 0.0), is_broken

    def _fire(self, features: Tensor) -> Tensor:
        """Multiply the memberships of finite features, (..., K), to (..., R)."""
        # a batch of 64 is so little work that the number of kernels is the time: all memberships are made at once
        knots = self.knots.to(features.dtype)
        lower, upper = knots[:, :-1], knots[:, 1:]
        ramps = ((features.unsqueeze(-1) - lower) / (upper - lower)).clamp(0.0, 1.0)  # (..., K, terms - 1)
        ramps = functional.pad(functional.pad(ramps, (1, 0), value=1.0), (0, 1))  # one to zero, (..., K, terms + 1)
        first, *others = (ramps[..., :-1] - ramps[..., 1:]).unbind(dim=-2)
        firing = first[..., : self.term_counts[0]]
        for membership, count in zip(others, self.term_counts[1:], strict=True):
            firing = (firing.unsqueeze(-1) * membership[..., :count].unsqueeze(-2)).flatten(-2)
        return firing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZeroOrderTSK:
        """Follow moves between devices, but not casts."""

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"terms={self.term_counts}, rules={len(self.consequents)}, non_finite={self.non_finite}"


def _pad_peaks(peaks: Sequence[Sequence[float]]) -> Tensor:
    """Stack the peaks in float32, (K, terms); shorter rows go on out of reach."""
    longest = max(len(row) for row in peaks)
    padded = [[*row, *(row[-1] + step * OUT_OF_REACH for step in range(1, longest - len(row) + 1))] for row in peaks]
    knots = torch.tensor(padded, dtype=torch.float32)
    if min(len(row) for row in peaks) < 2 or not (knots.diff(dim=-1) > 0).all():
        raise ValueError(
            f"The peaks are {[list(row) for row in peaks]}; two or more per feature, strictly increasing in float32, "
            "are allowed; spread them."
        )
    return knots
