"""The count by formula is what torch counts of the pass that runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fuzzyroe.attach import attach
from fuzzyroe.flops import DecoderSizes, decode_flops, prefill_flops

PLANS = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()


def counted(model, **inputs) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops(), output.past_key_values


@pytest.mark.parametrize("unit", ["layer", "attention", "ffn"])
def test_prefill_and_decoding_are_counted_as_torch_counts_them(tiny_decoder, fixed_router, unit) -> None:
    attach(tiny_decoder, 6, "xavier", fixed_router(PLANS), unit)
    tiny_decoder.set_attn_implementation("eager")  # the fused kernel is not counted on every CPU
    sizes = DecoderSizes.from_config(tiny_decoder.config, 6)
    ids = torch.randint(3, 95, (3, 11))
    # older versions of transformers compute the rotary angles by a matrix product, which no formula minds
    rotary = tiny_decoder.model.rotary_emb.inv_freq.numel() * 2
    prefill, cache = counted(tiny_decoder, input_ids=ids)
    assert prefill - prefill_flops(sizes, PLANS, 11, unit) in (0, 11 * rotary)
    step, _ = counted(tiny_decoder, input_ids=ids[:, :1], past_key_values=cache)
    assert step - decode_flops(sizes, PLANS, 12, unit) in (0, rotary)


def test_the_bound_of_skipping_alone_is_the_closed_form() -> None:
    sizes = DecoderSizes(4096, 4096, 11008, 32000, 1024)
    keep = torch.arange(32) >= 8
    ratio = prefill_flops(sizes, torch.ones(1, 32).bool(), 640) / prefill_flops(sizes, keep.unsqueeze(0), 640)
    assert 1.30 < ratio < 1 / 0.75


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(KeyError, match="unknown"):
        prefill_flops(DecoderSizes(8, 8, 16, 10, 2), PLANS, 4, "head")
