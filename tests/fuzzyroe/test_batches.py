"""Promises of hard routing in batches: what a prompt gets does not depend on its neighbours, whatever is skipped."""

from __future__ import annotations

import pytest
import torch

from batches import NEW_TOKENS, generate, pad, prompts_of_lengths
from fuzzyroe.attach import attach, find_decoder, find_decoder_layers
from fuzzyroe.cache import kept_layers
from fuzzyroe.routing_state import RoutingState

UNITS = ("layer", "attention", "ffn")
NUM_PROMPTS, BATCH = 20, 8

UNIFORM_PLANS = {
    "everything skipped": [[0] * 4] * 4,
    "nothing skipped": [[1] * 4] * 4,
    "one row only skips": [[1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
    "one row only runs": [[0] * 4, [0] * 4, [1, 1, 0, 1], [0] * 4],
}


@pytest.mark.parametrize("unit", UNITS)
def test_twenty_prompts_in_mixed_batches_of_eight_equal_each_alone(tiny_decoder, fixed_router, unit):
    generator = torch.Generator().manual_seed(11)
    rows = prompts_of_lengths(torch.randint(1, 30, (NUM_PROMPTS,), generator=generator).tolist())
    keep = torch.rand(NUM_PROMPTS, 4, generator=generator) >= 0.5
    assert 0 < keep[:, 0].sum() < NUM_PROMPTS, "layer 0 is skipped by some"
    router = fixed_router(keep)
    attach(tiny_decoder, 4, "xavier", router, unit)
    for start in range(0, NUM_PROMPTS, BATCH):
        batch = slice(start, start + BATCH)
        router.keep = keep[batch].float()
        tokens, logits, output = generate(tiny_decoder, rows[batch])
        assert torch.equal(kept_layers(output.past_key_values, len(rows[batch])), keep[batch])
        for index, row in enumerate(rows[batch]):
            router.keep = keep[batch][index : index + 1].float()
            tokens_alone, logits_alone, _ = generate(tiny_decoder, [row])
            assert torch.equal(tokens[index], tokens_alone[0])
            torch.testing.assert_close(logits[index], logits_alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("plan", list(UNIFORM_PLANS))
def test_extreme_plans_and_one_token_prompts_equal_each_alone_and_uncached(tiny_llama, fixed_router, unit, plan):
    rows, keep = prompts_of_lengths([1, 6, 3, 1]), torch.tensor(UNIFORM_PLANS[plan]).bool()
    router = fixed_router(keep)
    attach(tiny_llama, 4, "xavier", router, unit)
    tokens, logits, output = generate(tiny_llama, rows)
    assert torch.equal(kept_layers(output.past_key_values, 4), keep)
    assert torch.equal(generate(tiny_llama, rows, use_cache=False)[0], tokens)
    for index, row in enumerate(rows):
        router.keep = keep[index : index + 1].float()
        tokens_alone, logits_alone, _ = generate(tiny_llama, [row])
        assert torch.equal(tokens[index], tokens_alone[0])
        torch.testing.assert_close(logits[index], logits_alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("unit", UNITS)
@torch.no_grad()
def test_right_padding_changes_no_logit(tiny_decoder, unit):
    rows = prompts_of_lengths([4, 9, 1, 6])
    keep = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    attach(tiny_decoder, 4, "xavier", skip_unit=unit)
    inputs = pad(rows, "right")
    batch = tiny_decoder(
        **inputs, routing=RoutingState.from_batch({"attention_mask": inputs["attention_mask"]}).forced(keep)
    ).logits
    for index, row in enumerate(rows):
        routing = RoutingState.from_batch({"attention_mask": torch.ones(1, len(row))}).forced(keep[index : index + 1])
        alone = tiny_decoder(input_ids=row.unsqueeze(0), routing=routing).logits
        torch.testing.assert_close(batch[index, : len(row)], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("unit", UNITS)
def test_never_skipping_is_the_dense_model_bit_for_bit_with_its_cache(tiny_decoder, fixed_router, unit):
    rows = prompts_of_lengths([7, 2, 12, 1])
    tokens, logits, dense = generate(tiny_decoder, rows)
    attach(tiny_decoder, 4, "xavier", fixed_router(torch.ones(4, 4)), unit)
    found_tokens, found_logits, routed = generate(tiny_decoder, rows)
    assert torch.equal(found_tokens, tokens) and torch.equal(found_logits, logits)
    for mine, theirs in zip(routed.past_key_values.layers, dense.past_key_values.layers, strict=True):
        assert type(mine) is type(theirs)
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def cache_bytes(output) -> int:
    stored = [layer for layer in output.past_key_values.layers if layer.keys is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)


@pytest.mark.parametrize(("unit", "most"), [("layer", 0.52), ("attention", 0.52), ("ffn", 1.0)])
def test_the_cache_at_half_the_layers_has_half_the_bytes(tiny_llama, fixed_router, unit, most):
    rows = prompts_of_lengths([9] * 8)
    dense = cache_bytes(generate(tiny_llama, rows)[2])
    generator = torch.Generator().manual_seed(2)
    keep = torch.stack([torch.randperm(4, generator=generator) < 2 for _ in rows])
    attach(tiny_llama, 4, "xavier", fixed_router(keep), unit)
    assert cache_bytes(generate(tiny_llama, rows)[2]) <= most * dense


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_of_a_batch_equal_those_of_each_prompt_alone(tiny_llama, fixed_router, unit, options):
    rows, keep = prompts_of_lengths([5, 1, 8, 4]), torch.tensor(UNIFORM_PLANS["one row only skips"]).bool()
    router = fixed_router(keep)
    attach(tiny_llama, 4, "xavier", router, unit)
    count = options.get("num_return_sequences", 1)
    batch = generate(tiny_llama, rows, **options)[0]
    for index, row in enumerate(rows):
        router.keep = keep[index : index + 1].float()
        assert torch.equal(batch[index * count : (index + 1) * count], generate(tiny_llama, [row], **options)[0])


@pytest.mark.parametrize("unit", UNITS)
def test_sampled_sequences_share_the_decision_of_their_prompt_and_stay_finite(tiny_llama, fixed_router, unit):
    keep = torch.tensor(UNIFORM_PLANS["one row only runs"]).bool()
    attach(tiny_llama, 4, "xavier", fixed_router(keep), unit)
    inputs = pad(prompts_of_lengths([5, 1, 8, 4]))
    torch.manual_seed(0)
    output = tiny_llama.generate(
        **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3, return_dict_in_generate=True
    )
    assert torch.equal(kept_layers(output.past_key_values, 12), keep.repeat_interleave(3, dim=0))
    assert output.sequences.shape == (12, 12) and find_decoder(tiny_llama).router.calls == [torch.Size([12, 8, 32])]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("plan", [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], ids=str)
def test_assisted_decoding_crops_to_the_same_tokens(tiny_llama, fixed_router, unit, plan):
    router = fixed_router(torch.tensor([plan]))
    attach(tiny_llama, 4, "xavier", router, unit)
    crops = []
    rows = [torch.tensor([5, 6, 7, 8, 5, 6, 7, 8, 5, 6])]
    plain = generate(tiny_llama, rows)[0]
    layer_class = type(generate(tiny_llama, rows)[2].past_key_values)
    original = layer_class.crop
    try:
        layer_class.crop = lambda self, count: (crops.append(count), original(self, count))[1]
        assisted = generate(tiny_llama, rows, prompt_lookup_num_tokens=3)[0]
    finally:
        layer_class.crop = original
    assert torch.equal(assisted, plain) and any(count < 0 for count in crops)


@pytest.mark.parametrize("unit", UNITS)
def test_skipped_rows_enter_none_of_the_skipped_work(tiny_llama, fixed_router, unit):
    rows = {name: [] for name in ("attention", "ffn")}
    keep = torch.tensor(UNIFORM_PLANS["one row only runs"]).bool()
    attach(tiny_llama, 4, "xavier", fixed_router(keep), unit)
    for layer in find_decoder_layers(tiny_llama):
        layer.self_attn.q_proj.register_forward_pre_hook(lambda m, args: rows["attention"].append(args[0].shape[0]))
        layer.mlp.up_proj.register_forward_pre_hook(lambda m, args: rows["ffn"].append(args[0].shape[0]))
    generate(tiny_llama, prompts_of_lengths([5, 1, 8, 4]))
    kept, everyone = [1, 1, 1] * NEW_TOKENS, [4] * 4 * NEW_TOKENS  # layers 0, 1 and 3 run, for one row
    assert rows["attention"] == (everyone if unit == "ffn" else kept)
    assert rows["ffn"] == (everyone if unit == "attention" else kept)
