"""Promises of layer-wise routing: each layer is decided when its input is there."""

from __future__ import annotations

import pytest
import torch

from fuzzyroe.attach import attach, find_decoder, find_decoder_layers, set_router
from fuzzyroe.cache import kept_layers
from fuzzyroe.routing_state import RoutingState
from layer_wise_router import LastTokenRouter


@pytest.fixture
def router() -> LastTokenRouter:
    """A router for four layers of width 32."""
    return LastTokenRouter(4, 32)


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def one(inputs, row):
    """One prompt alone, without its padding."""
    mask = inputs["attention_mask"][row].bool()
    return {"input_ids": inputs["input_ids"][row : row + 1, mask], "attention_mask": torch.ones(1, int(mask.sum()))}


@pytest.mark.parametrize("unit", ["layer", "attention", "ffn"])
def test_each_layer_is_decided_once_by_what_enters_it(tiny_decoder, padded_prompts, router, unit):
    attach(tiny_decoder, 4, "xavier", router, unit)
    inputs = {}

    def remember(layer, args):
        inputs.setdefault(layer.route_index, args[0])

    for layer in find_decoder_layers(tiny_decoder):
        layer.register_forward_pre_hook(remember)
    output = generate(tiny_decoder, padded_prompts)
    assert router.calls == [0, 1, 2, 3]
    expected = [router.decide(index, inputs[index], None) >= 0.5 for index in range(4)]
    kept = kept_layers(output.past_key_values, 4)
    assert torch.equal(kept, torch.cat(expected, dim=1)) and 0 < kept.sum() < 16


def test_a_batch_equals_each_prompt_alone(tiny_decoder, padded_prompts, router):
    attach(tiny_decoder, 4, "xavier", router)
    batch = generate(tiny_decoder, padded_prompts)
    for row in range(4):
        alone = generate(tiny_decoder, one(padded_prompts, row))
        assert torch.equal(batch.sequences[row, 9:], alone.sequences[0, -5:])
        for step in range(5):
            torch.testing.assert_close(batch.logits[step][row], alone.logits[step][0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_weights_of_all_layers_are_gathered_in_the_state(tiny_llama, padded_prompts, router):
    attach(tiny_llama, 4, "xavier", router)
    state = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]})
    logits = tiny_llama(**padded_prompts, routing=state).logits
    assert state.result.keep_weights.shape == (4, 1, 4)
    forced = RoutingState.from_batch({"attention_mask": padded_prompts["attention_mask"]}).forced(
        state.result.keep_weights[:, 0]
    )
    assert torch.equal(tiny_llama(**padded_prompts, routing=forced).logits, logits)
    assert torch.equal(tiny_llama(**padded_prompts, routing=state).logits, logits)
    assert router.calls == [0, 1, 2, 3], "a state that is decided is not decided again"


def soft_gradients(model, inputs, checkpointing):
    routing = RoutingState.from_batch({"attention_mask": inputs["attention_mask"]}, mode="soft")
    model.zero_grad()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    output = model(**inputs, labels=inputs["input_ids"], routing=routing, use_cache=False)
    (output.loss + routing.mean_skip_rate()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("unit", ["layer", "attention", "ffn"])
def test_checkpointing_asks_no_router_twice_and_changes_no_gradient(tiny_llama, padded_prompts, router, unit):
    attach(tiny_llama, 4, "xavier", router, unit)
    expected = soft_gradients(tiny_llama, padded_prompts, checkpointing=False)
    assert router.calls == [0, 1, 2, 3]
    runs = []
    find_decoder_layers(tiny_llama)[1].mlp.register_forward_pre_hook(lambda *args: runs.append(1))
    found = soft_gradients(tiny_llama, padded_prompts, checkpointing=True)
    assert len(runs) == 2, "the layer itself was computed again"
    assert router.calls == [0, 1, 2, 3] * 2
    assert set(found) == set(expected) == set(dict(tiny_llama.named_parameters()))
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    assert all(found[f"model.router.layers.{index}.weight"].abs().max() > 0 for index in range(4))


def test_weights_of_another_shape_are_refused(tiny_llama, padded_prompts, router, monkeypatch):
    attach(tiny_llama, 4, "xavier", router)
    monkeypatch.setattr(router, "decide", lambda layer, hidden_states, routing: torch.ones(4))
    message = r"decided layer 0 with weights of shape \(4,\); allowed is \(B, T\) with B = 4"
    with pytest.raises(ValueError, match=message):
        tiny_llama(**padded_prompts)


def test_a_router_without_decide_is_named(tiny_llama, padded_prompts, fixed_router):
    class Undecided(LastTokenRouter):
        decide = LastTokenRouter.__mro__[1].decide

    attach(tiny_llama, 4, router=Undecided(4, 32))
    with pytest.raises(NotImplementedError, match="Undecided has no `decide`"):
        tiny_llama(**padded_prompts)
    set_router(tiny_llama, fixed_router(torch.ones(4, 4)))
    tiny_llama(**padded_prompts)
    assert len(find_decoder(tiny_llama).router.calls) == 1
