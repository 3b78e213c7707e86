"""Promises of attaching to a model and of the hook that lets a router decide."""

import copy
import importlib

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from fuzzyroe.adapter import SkipAdapter
from fuzzyroe.attach import attach, detach, find_decoder, find_decoder_layers, is_attached, verify_attached
from fuzzyroe.cache import kept_layers
from fuzzyroe.routing_state import RoutingState

attach_module = importlib.import_module("fuzzyroe.attach")  # the package has a function of this name

KEEP = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]]).bool()


@torch.no_grad()
def logits_and_cache(model, **inputs):
    output = model(**inputs, use_cache=True)
    return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def assert_same_output(left, right):
    assert torch.equal(left[0], right[0])
    assert all(torch.equal(a, b) for pair in zip(left[1], right[1], strict=True) for a, b in zip(*pair, strict=True))


def test_attach_without_routing_changes_nothing(tiny_decoder, padded_prompts):
    names, expected = set(tiny_decoder.state_dict()), logits_and_cache(tiny_decoder, **padded_prompts)
    attach(tiny_decoder, 4, "xavier")
    assert_same_output(logits_and_cache(tiny_decoder, **padded_prompts), expected)
    assert names < set(tiny_decoder.state_dict())


def test_attach_without_routing_changes_nothing_in_llava(tiny_llava, image_prompts):
    expected = logits_and_cache(tiny_llava, **image_prompts)
    attach(tiny_llava, 4, "xavier")
    assert_same_output(logits_and_cache(tiny_llava, **image_prompts), expected)


def test_detach_restores_the_stock_model(tiny_decoder, padded_prompts, fixed_router):
    classes, names = [type(layer) for layer in find_decoder_layers(tiny_decoder)], list(tiny_decoder.state_dict())
    no_split, expected = set(tiny_decoder._no_split_modules), logits_and_cache(tiny_decoder, **padded_prompts)
    attach(tiny_decoder, 4, "xavier", fixed_router(KEEP))
    assert is_attached(tiny_decoder)
    detach(tiny_decoder)
    assert [type(layer) for layer in find_decoder_layers(tiny_decoder)] == classes
    assert list(tiny_decoder.state_dict()) == names
    assert set(tiny_decoder._no_split_modules) == no_split
    decoder = find_decoder(tiny_decoder)
    assert not decoder._forward_pre_hooks and not hasattr(decoder, "router")
    assert_same_output(logits_and_cache(tiny_decoder, **padded_prompts), expected)
    attach(tiny_decoder, 4)


def test_a_deep_copy_routes_by_itself(tiny_llama, padded_prompts, fixed_router):
    attach(tiny_llama, 4, "xavier", fixed_router(KEEP))
    twin = copy.deepcopy(tiny_llama)
    expected = logits_and_cache(tiny_llama, **padded_prompts)[0]
    assert torch.equal(logits_and_cache(twin, **padded_prompts)[0], expected)
    twin.model.router.keep.fill_(1)
    assert torch.equal(logits_and_cache(tiny_llama, **padded_prompts)[0], expected)
    detach(twin)
    assert torch.equal(logits_and_cache(tiny_llama, **padded_prompts)[0], expected)
    assert not twin.model._forward_pre_hooks


def test_device_maps_keep_routed_layers_whole(tiny_llava):
    attach(tiny_llava, 4)
    layer_size = sum(parameter.nbytes for parameter in find_decoder_layers(tiny_llava)[0].parameters())
    memory = {0: int(2.5 * layer_size), 1: 100 * layer_size}
    device_map = infer_auto_device_map(find_decoder(tiny_llava), memory, tiny_llava._no_split_modules)
    assert not [name for name in device_map if name.startswith("layers.") and name.count(".") > 1]
    assert type(find_decoder(tiny_llava))._no_split_modules == ["LlamaDecoderLayer"]


def test_adapters_follow_dtype_and_training_of_their_layer(tiny_llama):
    attach(tiny_llama.to(torch.bfloat16).train(), 4)
    layers = find_decoder_layers(tiny_llama)
    assert all(layer.adapter.up.weight.dtype == torch.bfloat16 and layer.adapter.training for layer in layers)
    assert [layer.route_index for layer in layers] == [0, 1, 2, 3]


def test_an_enabled_router_decides_once_and_only_at_inference(tiny_llama, padded_prompts, fixed_router):
    router = fixed_router(KEEP)
    attach(tiny_llama, 4, "xavier", router)
    output = tiny_llama.generate(**padded_prompts, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert router.calls == [torch.Size([4, 9, 32])]
    assert torch.equal(kept_layers(output.past_key_values, 4), KEEP)
    tiny_llama.train()(**padded_prompts)
    router.enabled = False
    tiny_llama.eval()(**padded_prompts)
    assert len(router.calls) == 1


def test_a_passed_state_is_planned_in_place_or_left_alone(tiny_llama, padded_prompts, fixed_router):
    router = fixed_router(KEEP)
    router.enabled = False
    attach(tiny_llama, 4, "xavier", router)
    state = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]})
    tiny_llama(**padded_prompts, routing=state)
    assert torch.equal(state.kept_layers(), KEEP)
    assert state.result.layer_runs == {0: 0, 1: 3, 2: 2, 3: 2}
    forced = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]}).forced(~KEEP)
    tiny_llama(**padded_prompts, routing=forced)
    assert len(router.calls) == 1 and forced.result.layer_runs == {0: 4, 1: 1, 2: 2, 3: 2}


def test_the_router_sees_the_same_states_however_the_decoder_is_called(tiny_llama, padded_prompts, fixed_router):
    attach(tiny_llama, 4, "xavier", fixed_router(KEEP))
    ids, mask = padded_prompts["input_ids"], padded_prompts["attention_mask"]
    with torch.no_grad():
        expected = tiny_llama.model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(tiny_llama.model(ids, mask).last_hidden_state, expected)
        embeds = tiny_llama.get_input_embeddings()(ids)
        assert torch.equal(tiny_llama.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, expected)
    assert len(tiny_llama.model.router.calls) == 3
    tiny_llama.model(ids)  # no mask: no padding


def test_chunked_prefill_is_refused_and_speculation_is_not(tiny_llama, padded_prompts, fixed_router):
    attach(tiny_llama, 4, "xavier", fixed_router(KEEP))
    with pytest.raises(ValueError, match="arrives in chunks, the first of 4 positions"):
        tiny_llama.generate(**padded_prompts, max_new_tokens=2, prefill_chunk_size=4)
    alone = {name: value[1:2] for name, value in padded_prompts.items()}
    tiny_llama.model.router.keep = KEEP[2:3].float()
    plain = tiny_llama.generate(**alone, max_new_tokens=8, do_sample=False)
    lookup = tiny_llama.generate(**alone, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, lookup)


def test_a_static_cache_is_refused_only_when_routing_is_on(tiny_llama, padded_prompts, fixed_router):
    attach(tiny_llama, 4, "xavier", fixed_router(KEEP))
    with pytest.raises(TypeError, match="needs a DynamicCache"):
        tiny_llama.generate(**padded_prompts, max_new_tokens=2, cache_implementation="static")
    tiny_llama.model.router.enabled = False
    tiny_llama.generate(**padded_prompts, max_new_tokens=2, cache_implementation="static")
    forced = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]}).forced(KEEP)
    with pytest.raises(TypeError, match="needs a DynamicCache"):
        tiny_llama(
            **padded_prompts, past_key_values=StaticCache(config=tiny_llama.config, max_cache_len=16), routing=forced
        )


def test_forced_decisions_survive_a_prompt_in_chunks(tiny_llama, padded_prompts):
    attach(tiny_llama, 4, "xavier")
    mask = padded_prompts["attention_mask"]
    forced, cache = RoutingState.from_batch({"attention_mask": mask}).forced(KEEP), DynamicCache()
    with torch.no_grad():
        expected = tiny_llama(**padded_prompts, routing=forced).logits
        for chunk in (slice(0, 4), slice(4, 9)):
            ids, mask_so_far = padded_prompts["input_ids"][:, chunk], mask[:, : chunk.stop]
            positions = torch.arange(chunk.start, chunk.stop).unsqueeze(0)
            found = tiny_llama(ids, mask_so_far, positions, cache, routing=forced).logits
    valid = mask[:, 4:].bool()
    torch.testing.assert_close(found[valid], expected[:, 4:][valid], atol=1e-4, rtol=1e-4)


def test_accelerate_hooks_before_attach_still_route(tiny_llama, padded_prompts):
    layers = find_decoder_layers(tiny_llama)
    add_hook_to_module(layers[0], ModelHook())
    add_hook_to_module(layers[1], ModelHook())
    remove_hook_from_module(layers[1])  # leaves an instance attribute `forward` behind
    attach(tiny_llama, 4, "xavier")
    verify_attached(tiny_llama)
    routed = tiny_llama(
        **padded_prompts,
        routing=RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]}).forced(KEEP),
    ).logits
    assert not torch.equal(routed, tiny_llama(**padded_prompts).logits)
    detach(tiny_llama)
    tiny_llama(**padded_prompts)


def test_verify_attached_finds_a_layer_that_stayed_dense(tiny_llava):
    attach(tiny_llava, 4)
    verify_attached(tiny_llava)
    layer = find_decoder_layers(tiny_llava)[2]
    layer.forward = lambda *args, routing=None, **kwargs: layer.base_class.forward(layer, *args, **kwargs)
    with pytest.raises(RuntimeError, match=r"Layers \[2\] of 4"):
        verify_attached(tiny_llava)


def test_attach_verifies_itself_and_leaves_a_model_it_cannot_route_as_it_was(tiny_llama, monkeypatch):
    layers = find_decoder_layers(tiny_llama)
    dense = type(layers[1])
    monkeypatch.setattr(attach_module, "_swap_class", lambda layer, new_class: swap(layer, new_class, layers[1]))

    def swap(layer, new_class, bound):
        layer.__class__ = new_class
        if layer is bound and new_class is not dense:  # as a wrapper that holds the old forward
            layer.forward = lambda *args, routing=None, **kwargs: dense.forward(layer, *args, **kwargs)
        elif layer is bound:
            del layer.forward

    with pytest.raises(RuntimeError, match=r"Layers \[1\] of 4 ran without routing"):
        attach(tiny_llama, 4)
    assert not any(type(layer) is not dense for layer in layers)
    assert not tiny_llama.model._forward_pre_hooks


@pytest.mark.parametrize("unit", ["layer", "attention", "ffn"])
def test_attach_draws_no_random_number_but_those_of_the_adapters_and_changes_no_buffer(tiny_llama, unit):
    model = tiny_llama.train()
    for layer in find_decoder_layers(model):
        layer.self_attn.attention_dropout = 0.5
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    [SkipAdapter(32, 4, "zero") for _ in range(4)]
    expected = torch.rand(3)
    torch.manual_seed(0)
    attach(model, 4, skip_unit=unit)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_a_model_without_weights_is_attached_unverified(tiny_llama):
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama.config)
    assert is_attached(attach(model, 4))


def test_misuse_is_named(tiny_llama):
    with pytest.raises(ValueError, match="only an attached model"):
        detach(tiny_llama)
    with pytest.raises(TypeError, match="no plan and no enabled"):
        attach(tiny_llama, 4, router=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="width=0"):
        attach(tiny_llama, 0)
    assert not is_attached(tiny_llama)
    with pytest.raises(ValueError, match="Linear has no `layers`"):
        attach(torch.nn.Linear(2, 2), 4)
    find_decoder_layers(tiny_llama)[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(ValueError, match="`forward` of its own"):
        attach(tiny_llama, 4)
    del find_decoder_layers(tiny_llama)[1].forward
    attach(tiny_llama, 4)
    with pytest.raises(ValueError, match="attached once"):
        attach(tiny_llama, 4)


def test_a_state_without_weights_needs_a_router(tiny_llama, padded_prompts):
    attach(tiny_llama, 4)
    with pytest.raises(ValueError, match="no keep_weights"):
        tiny_llama(
            **padded_prompts, routing=RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]})
        )


def test_a_user_cache_is_routed_like_the_models_own(tiny_llama, padded_prompts, fixed_router):
    attach(tiny_llama, 4, "xavier", fixed_router(KEEP))
    cache = DynamicCache()
    with torch.no_grad():
        expected = tiny_llama(**padded_prompts).logits
        assert torch.equal(tiny_llama(**padded_prompts, past_key_values=cache).logits, expected)
    assert torch.equal(kept_layers(cache, 4), KEEP)
