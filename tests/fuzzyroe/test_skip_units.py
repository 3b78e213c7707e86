"""Promises of the skip units: each leaves out its part and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from fuzzyroe.attach import attach, detach, find_decoder, find_decoder_layers
from fuzzyroe.routed_layer import SKIP_UNITS
from fuzzyroe.routing_state import RoutingState

KEEP = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]]).bool()
units = pytest.mark.parametrize("unit", list(SKIP_UNITS))


@torch.no_grad()
def logits_of(model, inputs, keep, mode="hard"):
    return model(
        **inputs, routing=RoutingState.from_batch({"attention_mask": inputs["attention_mask"]}).forced(keep, mode)
    ).logits


def skipped_output(layer, unit, states, rotary):
    """What a layer without padding gives when its part is skipped, written out."""
    if unit == "layer":
        return states + layer.adapter(layer.input_layernorm(states))
    normed = layer.input_layernorm(states)
    attended = layer.adapter(normed) if unit == "attention" else layer.self_attn(normed, rotary, None)[0]
    states = states + attended
    normed = layer.post_attention_layernorm(states)
    return states + (layer.adapter(normed) if unit == "ffn" else layer.mlp(normed))


@units
@torch.no_grad()
def test_the_adapter_stands_in_for_the_part_that_is_skipped(tiny_decoder, unit):
    attach(tiny_decoder, 4, "xavier", skip_unit=unit)
    decoder, ids = find_decoder(tiny_decoder), torch.tensor([[5, 9, 60, 7]])
    states = decoder.get_input_embeddings()(ids)
    rotary = decoder.rotary_emb(states, torch.arange(4).unsqueeze(0))
    for layer in find_decoder_layers(tiny_decoder):
        states = skipped_output(layer, unit, states, rotary)
    expected = tiny_decoder.lm_head(decoder.norm(states))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(logits_of(tiny_decoder, inputs, torch.zeros(1, 4)), expected)


@units
def test_soft_weights_of_zero_and_one_are_the_hard_decision(tiny_decoder, padded_prompts, unit):
    attach(tiny_decoder, 4, "xavier", skip_unit=unit)
    valid = padded_prompts["attention_mask"].bool()
    soft, hard = (logits_of(tiny_decoder, padded_prompts, KEEP, mode)[valid] for mode in ("soft", "hard"))
    torch.testing.assert_close(soft, hard, atol=1e-4, rtol=1e-4)


@units
@torch.no_grad()
def test_soft_weights_of_one_are_the_dense_model(tiny_decoder, padded_prompts, unit):
    expected = tiny_decoder(**padded_prompts).logits
    attach(tiny_decoder, 4, "xavier", skip_unit=unit)
    assert torch.equal(logits_of(tiny_decoder, padded_prompts, torch.ones(4, 4), "soft"), expected)


@units
@torch.no_grad()
def test_units_add_the_same_tensors_and_detach_restores_the_stock_model(tiny_llama, padded_prompts, unit):
    names, expected = list(tiny_llama.state_dict()), tiny_llama(**padded_prompts).logits
    attach(tiny_llama, 4, "xavier", skip_unit=unit)
    added = set(tiny_llama.state_dict()) - set(names)
    assert added == {f"model.layers.{i}.adapter.{name}.weight" for i in range(4) for name in ("down", "up")}
    assert torch.equal(tiny_llama(**padded_prompts).logits, expected)
    assert not torch.equal(logits_of(tiny_llama, padded_prompts, KEEP), expected)
    detach(tiny_llama)
    assert list(tiny_llama.state_dict()) == names and not hasattr(find_decoder_layers(tiny_llama)[0], "skip_unit")
    assert torch.equal(tiny_llama(**padded_prompts).logits, expected)


@units
def test_a_deep_copy_knows_its_unit(tiny_llama, padded_prompts, unit):
    attach(tiny_llama, 4, "xavier", skip_unit=unit)
    twin = copy.deepcopy(tiny_llama)
    assert twin.model.layers[0].skip_unit == unit
    assert torch.equal(logits_of(twin, padded_prompts, KEEP), logits_of(tiny_llama, padded_prompts, KEEP))


@units
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_changes_no_gradient(tiny_llama, padded_prompts, unit):
    attach(tiny_llama.train(), 4, "xavier", skip_unit=unit)

    def gradients():
        weights = torch.full((4, 1, 4), 0.4, requires_grad=True)
        routing = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]}, mode="soft")
        routing.result.keep_weights = weights
        tiny_llama.zero_grad()
        tiny_llama(**padded_prompts, labels=padded_prompts["input_ids"], routing=routing).loss.backward()
        return [weights.grad, *(parameter.grad.clone() for parameter in tiny_llama.parameters())]

    expected = gradients()
    tiny_llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert expected[0].abs().min() > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(), expected, strict=True))


@units
def test_hidden_states_are_captured_for_every_layer_and_row(tiny_llama, padded_prompts, unit):
    attach(tiny_llama, 4, "xavier", skip_unit=unit)
    routing = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]}).forced(KEEP)
    states = tiny_llama(**padded_prompts, routing=routing, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(4, 9, 32)] * 5


def test_an_unknown_unit_is_refused_with_the_known_ones(tiny_llama):
    with pytest.raises(KeyError, match="Skip unit 'token' is unknown; use one of layer, attention, ffn"):
        attach(tiny_llama, 4, skip_unit="token")
    with pytest.raises(KeyError, match="unknown"):
        attach(tiny_llama, 4, skip_unit="")


@pytest.mark.parametrize(("unit", "part"), [("attention", "self_attn"), ("ffn", "mlp")])
def test_a_layer_without_the_part_is_named(tiny_llama, unit, part):
    layer = find_decoder_layers(tiny_llama)[2]
    setattr(layer, f"other_{part}", getattr(layer, part))
    delattr(layer, part)
    with pytest.raises(ValueError, match=f"Layer 2 .LlamaDecoderLayer. has no `{part}`"):
        attach(tiny_llama, 4, skip_unit=unit)
    attach(tiny_llama, 4)
