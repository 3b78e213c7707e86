"""Promises of the table of stages: what each trains, by name of part and by name of parameter."""

from __future__ import annotations

import re

import pytest
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import attach
from llava.train.param_groups import freeze_all_but
from llava.train.stages import PARTS, STAGES, get_stage

# stage: parts that train, routing, whether the router is calibrated
TABLE = {
    "dense": ({"projector", "decoder"}, "off", False),
    "scratch": ({"vision_tower", "projector", "decoder"}, "off", False),
    "router": (set(), "plan", True),
    "adapter": ({"adapter"}, "plan", True),
    "finetune": ({"projector", "decoder", "adapter"}, "plan", True),
}
NAMES = {
    "vision_tower": r"model\.vision_tower\.",
    "projector": r"model\.multi_modal_projector\.",
    "adapter": r"model\.language_model\.layers\.\d+\.adapter\.(down|up)\.weight$",
    "decoder": r"(model\.language_model\.(?!layers\.\d+\.adapter\.)|lm_head\.)",
}


def test_the_table_is_complete() -> None:
    assert set(STAGES) == set(TABLE)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_trains_routes_and_calibrates_as_the_table_says(name: str) -> None:
    stage = get_stage(name)
    assert (set(stage.trains), stage.routing, stage.calibrates) == TABLE[name]
    assert stage.name == name and set(stage.trains) <= set(PARTS) and stage.purpose
    assert stage.routing != "off" or "adapter" not in stage.trains


@pytest.mark.parametrize("name", STAGES)
def test_the_parameters_that_train_are_those_of_the_named_parts(
    name: str, tiny_llava: LlavaForConditionalGeneration
) -> None:
    if STAGES[name].routing != "off":
        attach(tiny_llava, 4)
    wanted = {
        parameter
        for parameter, _ in tiny_llava.named_parameters()
        if any(re.match(NAMES[part], parameter) for part in TABLE[name][0])
    }
    trained = freeze_all_but(tiny_llava, STAGES[name])
    assert len(trained) == len(set(trained)) and set(trained) == wanted
    assert {parameter for parameter, p in tiny_llava.named_parameters() if p.requires_grad} == wanted
    assert bool(wanted) == bool(STAGES[name].trains)


def test_an_unknown_stage_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="Stage 'pretrain' is unknown; use one of dense, scratch, router"):
        get_stage("pretrain")
