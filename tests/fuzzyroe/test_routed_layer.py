"""Promises of the routed forward: what is skipped is really skipped, and skipping is exact."""

import functools

import pytest
import torch

from fuzzyroe.attach import attach, find_decoder, find_decoder_layers
from fuzzyroe.cache import kept_layers
from fuzzyroe.routed_layer import mix, routed_class
from fuzzyroe.routing_state import RoutingState, RowSplit

PLANS = {
    "layer 0 skipped by all": [[0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]],
    "one row skips every layer": [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]],
    "last layer skipped by all": [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]],
    "only one row runs": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]],
    "nobody runs": [[0] * 4] * 4,
}
plans = pytest.mark.parametrize("plan", list(PLANS))


def keep_of(plan):
    return torch.tensor(PLANS[plan]).bool()


def one(inputs, row):
    """One prompt alone, without its padding."""
    mask = inputs["attention_mask"][row].bool()
    return {"input_ids": inputs["input_ids"][row : row + 1, mask], "attention_mask": torch.ones(1, int(mask.sum()))}


def generate(model, inputs, num_tokens=5, **options):
    return model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


@torch.no_grad()
def forward(model, inputs, keep, mode="hard", **options):
    routing = RoutingState.from_batch({"attention_mask": inputs["attention_mask"]}).forced(keep, mode=mode)
    return model(**inputs, routing=routing, **options)


def test_never_skipping_is_the_dense_model_bit_for_bit(tiny_decoder, padded_prompts, fixed_router):
    expected = generate(tiny_decoder, padded_prompts)
    attach(tiny_decoder, 4, "xavier", fixed_router(torch.ones(4, 4)))
    found = generate(tiny_decoder, padded_prompts)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    for a, b in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert type(a) is type(b) and torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@plans
def test_a_mixed_padded_batch_equals_each_prompt_alone(tiny_decoder, padded_prompts, fixed_router, plan):
    keep = keep_of(plan)
    router = fixed_router(keep)
    attach(tiny_decoder, 4, "xavier", router)
    batch = generate(tiny_decoder, padded_prompts)
    assert torch.equal(kept_layers(batch.past_key_values, 4), keep)
    for row in range(4):
        router.keep = keep[row : row + 1].float()
        alone = generate(tiny_decoder, one(padded_prompts, row))
        assert torch.equal(batch.sequences[row, 9:], alone.sequences[0, -5:])
        for step in range(5):
            torch.testing.assert_close(batch.logits[step][row], alone.logits[step][0], atol=1e-4, rtol=1e-4)


@plans
def test_cached_logits_equal_uncached_logits(tiny_decoder, padded_prompts, fixed_router, plan):
    attach(tiny_decoder, 4, "xavier", fixed_router(keep_of(plan)))
    cached, uncached = (generate(tiny_decoder, padded_prompts, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)


@plans
def test_skipped_rows_never_enter_the_layer(tiny_llama, padded_prompts, fixed_router, plan):
    keep, rows = keep_of(plan), {index: [] for index in range(4)}
    attach(tiny_llama, 4, "xavier", fixed_router(keep))
    for index, layer in enumerate(find_decoder_layers(tiny_llama)):
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda module, args, index=index: rows[index].append(args[0].shape[0])
        )
    output = generate(tiny_llama, padded_prompts, num_tokens=3)
    for index, count in enumerate(keep.sum(dim=0).tolist()):
        assert rows[index] == ([count] * 3 if count else [])
        keys = output.past_key_values.layers[index].keys
        assert (0 if keys is None else keys.shape[0]) == count


def test_a_skipped_layer_is_the_input_plus_its_adapter(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    keep = torch.zeros(4, 4).bool()
    hidden_states = tiny_llama.get_input_embeddings()(padded_prompts["input_ids"])
    for layer in find_decoder_layers(tiny_llama):
        hidden_states = hidden_states + layer.adapter(layer.input_layernorm(hidden_states))
    expected = tiny_llama.lm_head(find_decoder(tiny_llama).norm(hidden_states))
    torch.testing.assert_close(forward(tiny_llama, padded_prompts, keep).logits, expected)


def test_an_image_prompt_is_skipped_exactly(tiny_llava, image_prompts):
    attach(tiny_llava, 4, "xavier")
    keep = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]]).bool()
    batch = forward(tiny_llava, image_prompts, keep).logits
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in image_prompts.items()}
        expected = forward(tiny_llava, alone, keep[row : row + 1]).logits
        valid = alone["attention_mask"][0].bool()
        torch.testing.assert_close(batch[row][valid], expected[0][valid], atol=1e-4, rtol=1e-4)


@plans
def test_beam_search_equals_each_prompt_alone_and_uncached(tiny_llama, padded_prompts, fixed_router, plan):
    keep = keep_of(plan)
    router = fixed_router(keep)
    attach(tiny_llama, 4, "xavier", router)
    beams = functools.partial(tiny_llama.generate, max_new_tokens=4, do_sample=False, num_beams=3)
    batch = beams(**padded_prompts)
    assert torch.equal(batch, beams(**padded_prompts, use_cache=False))
    for row in range(4):
        router.keep = keep[row : row + 1].float()
        assert torch.equal(batch[row, 9:], beams(**one(padded_prompts, row))[0, -4:])


def test_return_sequences_share_the_decision_of_their_prompt(tiny_llama, padded_prompts, fixed_router):
    keep = keep_of("one row skips every layer")
    attach(tiny_llama, 4, "xavier", fixed_router(keep))
    output = tiny_llama.generate(
        **padded_prompts, max_new_tokens=3, do_sample=True, num_return_sequences=2, return_dict_in_generate=True
    )
    assert torch.equal(kept_layers(output.past_key_values, 8), keep.repeat_interleave(2, dim=0))


@plans
def test_after_a_crop_the_same_step_gives_the_same_logits(tiny_llama, padded_prompts, plan):
    attach(tiny_llama, 4, "xavier")
    cache = forward(tiny_llama, padded_prompts, keep_of(plan), use_cache=True).past_key_values
    step = {
        "input_ids": torch.full((4, 2), 5),
        "attention_mask": torch.cat([padded_prompts["attention_mask"], torch.ones(4, 2).long()], dim=1),
        "past_key_values": cache,
    }
    with torch.no_grad():
        first = tiny_llama(**step).logits
        assert cache.get_seq_length() == 11
        cache.crop(-2)
        assert torch.equal(tiny_llama(**step).logits, first)


def test_selected_rows_of_a_cache_continue_as_before(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    cache = forward(tiny_llama, padded_prompts, keep_of("one row skips every layer"), use_cache=True).past_key_values
    mask = torch.cat([padded_prompts["attention_mask"], torch.ones(4, 1).long()], dim=1)
    with torch.no_grad():
        ids = torch.full((4, 1), 5)
        every = tiny_llama(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([3, 1]))
        some = tiny_llama(input_ids=ids[:2], attention_mask=mask[[3, 1]], past_key_values=cache).logits
    torch.testing.assert_close(some, every[[3, 1]], atol=1e-4, rtol=1e-4)


@plans
def test_soft_weights_of_zero_and_one_are_the_hard_decision(tiny_decoder, padded_prompts, plan):
    attach(tiny_decoder, 4, "xavier")
    valid = padded_prompts["attention_mask"].bool()
    soft, hard = (forward(tiny_decoder, padded_prompts, keep_of(plan), mode).logits[valid] for mode in ("soft", "hard"))
    torch.testing.assert_close(soft, hard, atol=1e-4, rtol=1e-4)


def test_soft_keep_weights_of_one_are_the_dense_model(tiny_decoder, padded_prompts):
    with torch.no_grad():
        expected = tiny_decoder(**padded_prompts).logits
    attach(tiny_decoder, 4, "xavier")
    assert torch.equal(forward(tiny_decoder, padded_prompts, torch.ones(4, 4), "soft").logits, expected)


def test_soft_routing_blends_each_turn_with_its_own_weight(tiny_llama):
    attach(tiny_llama, 4, "xavier")
    layer = routed = find_decoder_layers(tiny_llama)[1]
    hidden_states = torch.randn(1, 4, 32)
    position_ids = torch.arange(4).unsqueeze(0)
    arguments = {"position_embeddings": find_decoder(tiny_llama).rotary_emb(hidden_states, position_ids)}
    turn_ids = torch.tensor([[0, 1, 2, 2]])
    weights = torch.zeros(1, 2, 4)
    weights[0, :, 1] = torch.tensor([0.2, 0.8])
    routing = RoutingState(turn_ids, turn_ids < 0, turn_ids > 0, "soft", weights)
    with torch.no_grad():
        base, skip = layer.base_class.forward(layer, hidden_states, **arguments), layer.skip_output(hidden_states)
        keep = torch.tensor([0.5, 0.2, 0.8, 0.8]).view(1, 4, 1)
        torch.testing.assert_close(routed(hidden_states, routing=routing, **arguments), keep * base + (1 - keep) * skip)


def soft_gradients(model, inputs, checkpointing):
    weights = torch.full((4, 1, 4), 0.4, requires_grad=True)
    routing = RoutingState.from_batch({"attention_mask": inputs["attention_mask"]}, mode="soft")
    routing.result.keep_weights = weights
    model.zero_grad()
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    output = model(**inputs, labels=inputs["input_ids"], routing=routing, use_cache=False)
    (output.loss + routing.mean_skip_rate()).backward()
    return {"keep": weights.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_changes_no_gradient(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    expected = {name: grad.clone() for name, grad in soft_gradients(tiny_llama, padded_prompts, None).items()}
    found = soft_gradients(tiny_llama, padded_prompts, {"use_reentrant": False})
    assert expected["keep"].abs().min() > 0 and set(found) == set(expected) == {"keep"} | set(
        dict(tiny_llama.named_parameters())
    )
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_checkpointing_is_refused(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    with pytest.raises(ValueError, match="use_reentrant=True"):
        soft_gradients(tiny_llama, padded_prompts, {"use_reentrant": True})


def test_hidden_states_are_captured_for_every_layer_and_row(tiny_llava, image_prompts):
    attach(tiny_llava, 4, "xavier")
    keep = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]).bool()
    states = forward(tiny_llava, image_prompts, keep, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 22, 32)] * 5


def test_hard_routing_passes_gradients_to_both_branches(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    keep = torch.tensor([[1, 0, 1, 0]] * 2 + [[0, 1, 1, 0]] * 2).bool()
    routing = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]}).forced(keep)
    tiny_llama(**padded_prompts, routing=routing, use_cache=False).logits.sum().backward()
    first, second, third, last = find_decoder_layers(tiny_llama)
    assert first.adapter.up.weight.grad is not None and first.mlp.up_proj.weight.grad is not None
    assert second.adapter.up.weight.grad is not None and third.adapter.up.weight.grad is None
    assert last.mlp.up_proj.weight.grad is None


def test_turn_ids_of_another_length_are_refused(tiny_llama, padded_prompts):
    attach(tiny_llama, 4)
    routing = RoutingState.from_batch({"attention_mask": torch.ones(4, 5)}).forced(torch.ones(4, 4), mode="soft")
    with pytest.raises(ValueError, match=r"turn_ids is \(4, 5\), but the layer runs on \(4, 9\)"):
        tiny_llama(**padded_prompts, routing=routing)


def test_a_mask_that_is_no_tensor_is_refused_where_rows_differ(tiny_llama):
    attach(tiny_llama, 4)
    routing = RoutingState.from_batch({"attention_mask": torch.ones(2, 3)}).forced(torch.tensor([[1] * 4, [0] * 4]))
    with pytest.raises(TypeError, match="attention mask is a dict"):
        find_decoder_layers(tiny_llama)[0](torch.randn(2, 3, 32), routing=routing, attention_mask={})


def test_multi_axis_position_tensors_lose_rows_of_their_batch_dimension(tiny_llama, monkeypatch):
    attach(tiny_llama, 4)
    seen = {}

    def base_forward(self, hidden_states, **kwargs):
        seen.update(kwargs)
        return hidden_states

    layer = find_decoder_layers(tiny_llama)[0]
    monkeypatch.setattr(layer.base_class, "forward", base_forward)
    routing = RoutingState.from_batch({"attention_mask": torch.ones(3, 5)}).forced(
        torch.tensor([[1] * 4, [0] * 4, [1] * 4])
    )
    positions = torch.arange(3 * 3 * 5).view(3, 3, 5)  # (axes, B, N)
    rotary = (positions.unsqueeze(-1).expand(3, 3, 5, 8), torch.zeros(1, 5, 8))
    layer(
        torch.randn(3, 5, 32),
        routing=routing,
        position_ids=positions,
        position_embeddings=rotary,
        lengths=torch.ones(3),
    )
    assert torch.equal(seen["position_ids"], positions[:, [0, 2]])
    assert torch.equal(seen["position_embeddings"][0], rotary[0][:, [0, 2]])
    assert seen["position_embeddings"][1] is rotary[1] and seen["lengths"].shape == (3,)


def test_the_routed_class_of_a_layer_class_is_made_once(tiny_llama, tiny_llava):
    base = type(find_decoder_layers(tiny_llama)[0])
    assert routed_class(base) is routed_class(type(find_decoder_layers(tiny_llava)[0]))
    assert issubclass(routed_class(base), base) and routed_class(base).__name__ == "RoutedLlamaDecoderLayer"


# mix: both branches put together, on literal numbers

STATES = torch.arange(12.0).view(3, 2, 2)


def double(states, *args, **kwargs):
    return 2 * states


def negate(states):
    return -states


def test_rows_go_through_one_branch_each():
    mixed = mix(RowSplit(torch.tensor([True, False, True])), double, negate, STATES, (), {})
    assert torch.equal(mixed, torch.stack([2 * STATES[0], -STATES[1], 2 * STATES[2]]))


def test_where_all_rows_skip_nothing_is_run():
    def refuse(states):
        raise AssertionError

    assert torch.equal(mix(RowSplit(torch.zeros(3).bool()), refuse, negate, STATES, (), {}), -STATES)


def test_the_run_gets_the_rows_of_its_arguments():
    seen = {}

    def run(states, mask, **kwargs):
        seen.update(kwargs, states=states, mask=mask)
        return states

    mask, flag = torch.arange(3.0).view(3, 1), torch.tensor([1, 2, 3])
    kwargs = {"position_ids": torch.zeros(1, 2), "flag": flag, "cache": None}
    mix(RowSplit(torch.tensor([False, True, True])), run, negate, STATES, (mask,), kwargs)
    assert torch.equal(seen["states"], STATES[1:]) and seen["mask"].tolist() == [[1], [2]]
    assert seen["position_ids"] is kwargs["position_ids"] and seen["flag"] is flag and seen["cache"] is None


def test_positions_blend_by_the_weight_of_their_turn():
    turn_ids = torch.tensor([[0, 1], [1, 2], [-1, 1]])
    weights = torch.tensor([[0.25, 0.0], [0.5, 1.0], [0.0, 0.0]]).view(3, 2, 1)
    routing = RoutingState(turn_ids, turn_ids < -1, turn_ids > 0, "soft", weights)
    keep = torch.tensor([[0.25, 0.25], [0.5, 1.0], [1.0, 0.0]]).unsqueeze(-1)
    mixed = mix(routing.position_weights(0), double, negate, STATES, (), {})
    torch.testing.assert_close(mixed, keep * 2 * STATES + (1 - keep) * -STATES)


def test_a_run_that_gives_more_than_a_tensor_is_refused():
    split = RowSplit(torch.tensor([True, False, True]))
    with pytest.raises(TypeError, match="gave a tuple; routed layers need"):
        mix(split, lambda states: (states, None), negate, STATES, (), {})
