"""Promises of parts and optimizer groups: every parameter in exactly one, compared as sets of names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import attach
from fuzzyroe.routers import LinearRouter
from llava.train.parameters import build_param_groups, freeze_all_but, parameters_by_part
from llava.train.stages import PARTS, STAGES

RATES = {"vision_tower": 1e-6, "projector": 2e-5, "decoder": 3e-5, "adapter": 4e-4, "router": 5e-4, "lora": 2e-4}


@pytest.fixture
def routed(tiny_llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    return attach(tiny_llava, 4, "xavier", LinearRouter(4, 32))


def names_in(groups: list[dict], model: torch.nn.Module) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def test_every_parameter_belongs_to_one_part(routed: LlavaForConditionalGeneration) -> None:
    parts = parameters_by_part(routed)
    assert tuple(parts) == PARTS
    listed = [name for named in parts.values() for name in named]
    assert sorted(listed) == sorted(name for name, _ in routed.named_parameters())
    assert all(parts[part][name] is routed.get_parameter(name) for part in PARTS for name in parts[part])
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= set(parts["decoder"])
    assert parts["router"] and all(".language_model.router." in name for name in parts["router"])
    assert len(parts["adapter"]) == 2 * 4 and all(".adapter." in name for name in parts["adapter"])
    assert all("vision_tower" in name for name in parts["vision_tower"])
    assert all("multi_modal_projector" in name for name in parts["projector"])


def test_a_dense_model_has_no_adapter_part(tiny_llava: LlavaForConditionalGeneration) -> None:
    assert parameters_by_part(tiny_llava)["adapter"] == {}


@pytest.mark.parametrize("name", STAGES)
def test_every_trainable_parameter_is_in_exactly_one_group(name: str, routed: LlavaForConditionalGeneration) -> None:
    trained = freeze_all_but(routed, STAGES[name])
    groups = build_param_groups(routed, RATES, 0.1)
    assert sorted(names_in(groups, routed)) == sorted(trained)
    for group in groups:
        part, kind = group["name"].split("/")
        assert part in STAGES[name].trains and group["params"]
        assert set(names_in([group], routed)) <= set(parameters_by_part(routed)[part])
        assert group["lr"] == RATES[part] and group["weight_decay"] == {"decay": 0.1, "no_decay": 0.0}[kind]


def test_only_matrices_decay(routed: LlavaForConditionalGeneration) -> None:
    freeze_all_but(routed, STAGES["scratch"])
    for group in build_param_groups(routed, RATES, 0.1):
        dimensions = {parameter.dim() for parameter in group["params"]}
        assert dimensions == {1} if group["weight_decay"] == 0 else min(dimensions) >= 2


def test_a_sharded_parameter_decays_by_its_whole_shape(tiny_llava: LlavaForConditionalGeneration) -> None:
    freeze_all_but(tiny_llava, STAGES["dense"])
    matrix = tiny_llava.lm_head.weight
    matrix.ds_shape, matrix.data = matrix.shape, matrix.data.new_empty(0)  # as ZeRO-3 leaves it
    groups = build_param_groups(tiny_llava, RATES, 0.1)
    assert "lm_head.weight" in names_in([group for group in groups if group["weight_decay"]], tiny_llava)


def test_freezing_again_undoes_an_earlier_stage(routed: LlavaForConditionalGeneration) -> None:
    freeze_all_but(routed, STAGES["scratch"])
    freeze_all_but(routed, STAGES["adapter"])
    assert all(p.requires_grad == (".adapter." in name) for name, p in routed.named_parameters())
    assert freeze_all_but(routed, SimpleNamespace(trains=())) == []
    assert build_param_groups(routed, RATES, 0.1) == []
