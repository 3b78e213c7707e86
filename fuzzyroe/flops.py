"""Floating-point operations of a routed decoder, by formula.

Multiplications and additions of the matrix products count, norms and activations do not. Per position, with hidden size
D, key/value width K, MLP width F, adapter width A, context C (positions that it attends to):

    attention     2 D (2 D + 2 K) + 4 D C      queries and output; keys and values; scores and their use
    MLP           6 D F                         gate, up, down
    adapter       4 D A                         in place of what is skipped
    output head   2 D V                         where a logit is asked for, vocabulary V

A prefill of N positions has C = N for each: kernels may leave out what a causal mask hides, the count does not, as in
torch's ``FlopCounterMode``. Published counts of one model differ by up to 2.8 times, so compare ratios, not counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fuzzyroe.routed_layer import SKIP_UNITS


@dataclass(frozen=True)
class DecoderSizes:
    """Widths of a decoder that the count needs.

    Attributes:
        hidden: D.
        key_value: K, heads of keys times their size.
        mlp: F.
        vocabulary: V.
        adapter: A.
    """

    hidden: int
    key_value: int
    mlp: int
    vocabulary: int
    adapter: int

    @classmethod
    def from_config(cls, config: Any, adapter_width: int) -> DecoderSizes:
        """Read the sizes of a Llama-like text configuration."""
        # some configurations name the head size, the others imply it
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.num_key_value_heads * head_size,
            config.intermediate_size,
            config.vocab_size,
            adapter_width,
        )


def prefill_flops(sizes: DecoderSizes, plans: Tensor, length: int, unit: str = "layer") -> int:
    """Count the prefill of a batch of N positions each, with logits at the last position of each row.

    Args:
        sizes: Of the decoder.
        plans: True where the row runs the layer, (B, L) bool.
        length: N.
        unit: What a skip leaves out, a name in ``SKIP_UNITS``.
    """
    return decode_flops(sizes, plans, length, unit, length)


def decode_flops(sizes: DecoderSizes, plans: Tensor, context: int, unit: str = "layer", num_positions: int = 1) -> int:
    """Count one decoding step of a batch, or several positions; each attends to ``context`` ones, itself included."""
    if unit not in SKIP_UNITS:
        raise KeyError(f"Skip unit '{unit}' is unknown; use one of {', '.join(SKIP_UNITS)}.")
    hidden = sizes.hidden
    attention = 2 * hidden * (2 * hidden + 2 * sizes.key_value) + 4 * hidden * context
    parts = {"attention": attention, "ffn": 6 * hidden * sizes.mlp}
    # a skipped part is replaced by the adapter, whatever the part is
    layer = sum(parts.values())
    skipped = layer - parts.get(unit, layer) + 4 * hidden * sizes.adapter
    num_kept = int(plans.sum())
    positions = num_kept * layer + (plans.numel() - num_kept) * skipped
    return num_positions * positions + plans.shape[0] * 2 * hidden * sizes.vocabulary
