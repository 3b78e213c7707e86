"""Promises of the table of stages: what each trains, by name of part and by name of parameter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from fuzzyroe.attach import attach
from fuzzyroe.routers import FuzzyRouter, LinearRouter
from fuzzyroe.rules import load_rule_base
from llava.train.arguments import PlanArguments, parse_arguments, stage_of
from llava.train.checks import check_inputs
from llava.train.parameters import freeze_all_but
from llava.train.stage import run_stage
from llava.train.stages import PARTS, STAGES, Stage, StageInputError, choose_stage, get_stage
from tiny_training import Tiny

# stage: parts that train, routing, whether the router is calibrated
TABLE = {
    "pretrain": ({"projector"}, "off", False),
    "dense": ({"projector", "decoder"}, "off", False),
    "scratch": ({"vision_tower", "projector", "decoder"}, "off", False),
    "router": (set(), "plan", True),
    "adapter": ({"adapter"}, "plan", True),
    "finetune": ({"projector", "decoder", "adapter"}, "plan", True),
    "roe_adapter": ({"adapter"}, "relaxed", False),
    "roe_router": ({"adapter", "router"}, "relaxed", False),
    "roe_finetune": ({"projector", "decoder", "adapter", "router"}, "relaxed", False),
}
NAMES = {
    "vision_tower": r"model\.vision_tower\.",
    "projector": r"model\.multi_modal_projector\.",
    "adapter": r"model\.language_model\.layers\.\d+\.adapter\.(down|up)\.weight$",
    "router": r"model\.language_model\.router\.",
    "decoder": r"(model\.language_model\.(?!layers\.\d+\.adapter\.|router\.)|lm_head\.)",
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
    text_config = tiny_llava.config.text_config
    if STAGES[name].routing == "plan":
        attach(tiny_llava, 4, router=FuzzyRouter(load_rule_base("default"), text_config.num_hidden_layers))
    elif STAGES[name].routing == "relaxed":
        router = LinearRouter(text_config.num_hidden_layers, text_config.hidden_size)
        attach(tiny_llava, 4, "xavier", router)
    wanted = {
        parameter
        for parameter, _ in tiny_llava.named_parameters()
        if any(re.match(NAMES[part], parameter) for part in TABLE[name][0])
    }
    trained = freeze_all_but(tiny_llava, STAGES[name])
    assert len(trained) == len(set(trained)) and set(trained) == wanted
    assert {parameter for parameter, p in tiny_llava.named_parameters() if p.requires_grad} == wanted
    assert bool(wanted) == bool(STAGES[name].trains)


def test_the_spans_of_roes_stages_make_up_one_run() -> None:
    spans = [stage.span for stage in STAGES.values() if stage.routing == "relaxed"]
    assert spans == [(0.0, 0.3), (0.3, 0.5), (0.5, 1.0)]
    assert all(stage.span is None for stage in STAGES.values() if stage.routing != "relaxed")


def test_an_unknown_stage_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="Stage 'alignment' is unknown; use one of pretrain, dense, scratch, router"):
        get_stage("alignment")


@pytest.mark.parametrize(
    ("flags", "name", "trains"),
    [
        ({}, "dense", ("projector", "decoder")),
        ({"tune_projector": True}, "pretrain", ("projector",)),
        ({"lora": True}, "dense", ("projector", "lora")),
        ({"freeze_decoder": True}, "dense", ("projector",)),
        ({"freeze_projector": True}, "dense", ("decoder",)),
        ({"freeze_projector": True, "lora": True}, "dense", ("lora",)),
        ({"name": "finetune", "lora": True}, "finetune", ("projector", "lora", "adapter")),
        ({"name": "roe_finetune", "freeze_decoder": True}, "roe_finetune", ("projector", "adapter", "router")),
        ({"name": "roe_router", "freeze_adapters": True}, "roe_router", ("router",)),
        ({"name": "finetune", "freeze_adapters": True}, "finetune", ("projector", "decoder")),
    ],
)
def test_flags_of_llava_choose_a_stage_and_what_it_trains(flags: dict, name: str, trains: tuple[str, ...]) -> None:
    stage = choose_stage(**{"name": None, **flags})
    assert (stage.name, stage.trains) == (name, trains)
    assert stage.routing == STAGES[name].routing and STAGES[name] is get_stage(name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"name": "dense", "tune_projector": True}, "--tune_mm_mlp_adapter trains the projector alone, stage dense"),
        ({"name": "router", "tune_projector": True}, "stage router trains nothing; leave one of the two out"),
        ({"name": "adapter", "lora": True}, "--lora_enable updates the decoder, which stage adapter does not train"),
        ({"lora": True, "freeze_decoder": True}, "--lora_enable updates the decoder, --freeze_backbone keeps it"),
        ({"freeze_decoder": True, "freeze_projector": True}, "The flags freeze all that stage dense trains"),
        ({"tune_projector": True, "freeze_projector": True}, "The flags freeze all that stage pretrain trains"),
        ({"name": "adapter", "freeze_adapters": True}, "The flags freeze all that stage adapter trains"),
        ({"freeze_adapters": True}, "--freeze_adapters was given, but stage dense trains no adapters"),
        ({"name": "router", "refit": False}, "--refit_router False was given, but stage router fits no router again"),
        ({"name": "roe_adapter", "fit_budgets": True}, "stage roe_adapter trains no linear routers; leave it out"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_stage(**{"name": None, **flags})


@pytest.mark.parametrize(
    ("flags", "fits"),
    [
        ({"name": "finetune"}, True),
        ({"name": "finetune", "refit": False}, False),
        ({"name": "router"}, True),
        ({"name": "roe_finetune"}, False),
        ({"name": "roe_finetune", "fit_budgets": True}, True),
    ],
)
def test_flags_choose_whether_a_router_is_fitted(flags: dict, fits: bool) -> None:
    assert choose_stage(**flags).calibrates == fits


def test_a_stage_is_one_entry_and_gets_the_flags_of_its_family(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = Stage("toy", ("projector", "adapter"), "plan", False, "a toy: projector and adapters, no refit")
    monkeypatch.setitem(STAGES, "toy", toy)
    arguments = parse_arguments(tiny.flags("toy", tiny.base, tmp_path / "toy", skip_pattern="random", max_steps=2))
    assert isinstance(arguments[2], PlanArguments) and stage_of(arguments) == toy
    check_inputs(arguments)
    summary = run_stage(arguments)
    assert (summary["stage"], summary["steps"]) == ("toy", 2) and "calibration" not in summary
    assert {part for part, has_moved in summary["moved"].items() if has_moved} == {"projector", "adapter"}
    with pytest.raises(StageInputError, match=r"--budget_samples 8 was given.* stage toy \(trains projector, adapter;"):
        parse_arguments(tiny.flags("toy", tiny.base, tmp_path / "toy", budget_samples=8))
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--stage", "toy", "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "--target_skip_ratio" in printed and "--skip_ratio" in printed
    assert "--roe_compat" not in printed


@pytest.mark.parametrize("flag", ["--target_skip_ratio", "--skip_ratio", "--target-skip-ratio"])
def test_the_target_has_roes_name_too(tiny: Tiny, tmp_path: Path, flag: str) -> None:
    words = tiny.flags("roe_adapter", tiny.base, tmp_path / "output")
    assert parse_arguments([*words, flag, "0.2"])[2].target_skip_ratio == 0.2
