"""Promises of saving and loading the routing tensors."""

import copy

import pytest
import torch

from fuzzyroe.attach import attach
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.state_dict import (
    load_routing,
    load_routing_state_dict,
    routing_names,
    routing_state_dict,
    routing_tensors,
    save_routing,
)

KEEP = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1]]).bool()


def logits(model, inputs):
    with torch.no_grad():
        return model(
            **inputs, routing=RoutingState.from_batch({"attention_mask": inputs["attention_mask"]}).forced(KEEP)
        ).logits


def test_a_saved_model_computes_the_same_after_loading(tiny_llama, padded_prompts, fixed_router, tmp_path):
    stock = copy.deepcopy(tiny_llama)
    attach(tiny_llama, 4, "xavier", fixed_router(KEEP))
    save_routing(routing_state_dict(tiny_llama), tmp_path / "routing.safetensors")
    attach(stock, 4, router=fixed_router(~KEEP))
    assert not torch.equal(logits(stock, padded_prompts), logits(tiny_llama, padded_prompts))
    load_routing_state_dict(stock, load_routing(tmp_path / "routing.safetensors"))
    assert torch.equal(logits(stock, padded_prompts), logits(tiny_llama, padded_prompts))
    assert torch.equal(stock.model.router.keep, KEEP.float())
    assert [path.name for path in tmp_path.iterdir()] == ["routing.safetensors"]


def test_names_do_not_depend_on_what_wraps_the_decoder(tiny_llama, tiny_llava):
    attach(tiny_llama, 4)
    attach(tiny_llava, 4)
    assert set(routing_tensors(tiny_llama)) == set(routing_tensors(tiny_llava))
    assert "layers.0.adapter.down.weight" in routing_tensors(tiny_llama)
    assert routing_names(tiny_llama)["model.layers.3.adapter.up.weight"] == "layers.3.adapter.up.weight"
    assert set(routing_names(tiny_llava)) < set(tiny_llava.state_dict())
    assert routing_names(tiny_llama.model)["layers.3.adapter.up.weight"] == "layers.3.adapter.up.weight"


def test_tensors_are_live_and_copies_are_not(tiny_llama):
    attach(tiny_llama, 4)
    live, copied = routing_tensors(tiny_llama), routing_state_dict(tiny_llama)
    name = "layers.1.adapter.up.weight"
    assert live[name] is tiny_llama.model.layers[1].adapter.up.weight
    live[name].data.fill_(3)
    assert not copied[name].requires_grad and torch.equal(copied[name], torch.zeros_like(copied[name]))


def test_gathered_tensors_stand_in_for_the_models_own(tiny_llama):
    attach(tiny_llama, 4)
    gathered = {name: torch.full_like(tensor, 2) for name, tensor in tiny_llama.state_dict().items()}
    assert all(bool((tensor == 2).all()) for tensor in routing_state_dict(tiny_llama, gathered).values())
    del gathered["model.layers.2.adapter.up.weight"]
    with pytest.raises(KeyError, match="layers.2.adapter.up.weight"):
        routing_state_dict(tiny_llama, gathered)


def test_loading_is_strict_and_all_or_nothing(tiny_llama):
    attach(tiny_llama, 4)
    tensors = {name: torch.ones_like(tensor) for name, tensor in routing_state_dict(tiny_llama).items()}
    del tensors["layers.1.adapter.up.weight"]
    tensors["layers.2.adapter.up.weight"] = torch.zeros(3, 2)
    tensors["router.table"] = torch.zeros(1)
    before = routing_state_dict(tiny_llama)
    with pytest.raises(ValueError, match=r"missing \['layers.1.*unexpected \['router.table.*layers.2.*\(3, 2\), not"):
        load_routing_state_dict(tiny_llama, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in routing_state_dict(tiny_llama).items())


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "routing.safetensors"
    save_routing({"a": torch.ones(1)}, path)
    with pytest.raises(Exception, match=r".+"):
        save_routing({"a": "no tensor"}, path)
    assert torch.equal(load_routing(path)["a"], torch.ones(1))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_stock_model_has_no_routing_tensors(tiny_llama):
    with pytest.raises(ValueError, match="Call attach first"):
        routing_tensors(tiny_llama)
