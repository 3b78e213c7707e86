"""Stages with other routers than the fuzzy one, and with parts of a method off, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fuzzyroe.attach import find_decoder
from fuzzyroe.routers import LinearRouter, get_router_class
from llava.model.builder import load_checkpoint
from llava.train.arguments import parse_arguments
from llava.train.checks import check_inputs
from llava.train.stage import run_stage
from llava.train.stages import StageInputError
from tiny_training import NUM_LAYERS, Tiny


def run(tiny: Tiny, stage: str, model: Path, output: Path, leave_out: tuple[str, ...] = (), **more: object) -> dict:
    """Check and run one stage; flags that would be refused are left out."""
    words = tiny.flags(stage, model, output, **more)
    pairs = [pair for pair in zip(words[::2], words[1::2], strict=True) if pair[0].removeprefix("--") not in leave_out]
    arguments = parse_arguments([word for pair in pairs for word in pair])
    check_inputs(arguments)
    return run_stage(arguments)


FITTING = ("calibration_samples", "order_samples", "score_samples", "calibration_batch_size")


@pytest.mark.parametrize(("name", "passes"), [("static", 8 * (3 + 2)), ("random", 0), ("linear_score", None)])
def test_a_router_is_fitted_kept_by_training_and_read_again(
    tiny: Tiny, tmp_path: Path, name: str, passes: int | None
) -> None:
    first = run(tiny, "router", tiny.base, tmp_path / "router", router=name, max_skip_ratio=0.5)
    assert passes is None or first["calibration"]["passes"] == passes
    fitted = load_checkpoint(tmp_path / "router")
    router = find_decoder(fitted.model).router
    assert type(router) is get_router_class(name)
    summary = run(
        tiny, "adapter", tmp_path / "router", tmp_path / "adapter", FITTING, refit_router=False, max_skip_ratio=0.5
    )
    assert "calibration" not in summary and summary["moved"]
    kept = find_decoder(load_checkpoint(tmp_path / "adapter").model).router
    assert kept.save_options(tmp_path) == router.save_options(tmp_path)
    for key, tensor in router.state_dict().items():
        assert torch.equal(kept.state_dict()[key], tensor)
    skipped = json.loads((tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()[0])["routing/skip_rate"]
    assert 0 <= skipped <= 0.5


def test_roe_is_given_budgets_and_keeps_its_trained_point(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, "roe_adapter", tiny.base, tmp_path / "a", skip_loss_weight=0.0)
    summary = run(tiny, "roe_router", tmp_path / "a", tmp_path / "r", budget_samples=16, max_skip_ratio=0.5)
    table = summary["calibration"]["bias_table"]
    assert summary["calibration"]["samples"] == 16 and summary["calibration"]["passes"] == 16 * 14
    model = load_checkpoint(tmp_path / "r").model
    router = find_decoder(model).router
    assert isinstance(router, LinearRouter) and router.skip_logit_bias == 0 and router.max_skip_ratio >= 0.5
    assert [list(pair) for pair in router.bias_table] == [pytest.approx(pair) for pair in table]
    router.set_skip_rate(0.5)
    assert router.skip_logit_bias != 0
    router.reset_target()
    assert router.skip_logit_bias == 0


def test_frozen_adapters_start_at_zero_and_stay(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, "roe_router", tiny.base, tmp_path / "bare", freeze_adapters=True)
    tensors = load_file(tmp_path / "bare" / "routing.safetensors")
    ups = [tensor for name, tensor in tensors.items() if name.endswith("up.weight")]
    assert len(ups) == NUM_LAYERS and not any(tensor.any() for tensor in ups)
    trained = json.loads((tmp_path / "bare" / "trainable_params.json").read_text())
    assert trained and "adapter" not in json.dumps(trained)


def test_without_the_hinge_the_loss_is_that_of_the_task(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, "roe_adapter", tiny.base, tmp_path / "a", skip_loss_weight=0.0)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "routing/task_loss" in line]
    assert len(steps) == 3 and any(line["routing/hinge"] > 0 for line in steps)
    for line in steps:
        assert line["loss"] == pytest.approx(line["routing/task_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (
            "router",
            {"router": "lucky"},
            "--router lucky is unknown; use one of fuzzy, linear_score, static, random",
        ),
        ("router", {"router": "static", "rule_base": "default"}, "--rule_base default .* a static router has no score"),
        ("router", {"router": "random", "per_layer_tables": True}, "--per_layer_tables True .* no score"),
        ("roe_adapter", {"router": "static"}, "--router static was given, but .* stage roe_adapter"),
        (
            "router",
            {"skip_loss_weight": 0.0},
            "--skip_loss_weight 0.0 .* stage router .* use one of the stages roe_adapter",
        ),
        ("roe_router", {"budget_samples": -1}, "--budget_samples -1 must be at least 0"),
        ("roe_router", {}, "goes on with adapters that are trained"),
    ],
)
def test_flags_that_nothing_would_act_on_are_refused(tiny: Tiny, tmp_path: Path, stage, flags, message) -> None:
    with pytest.raises((StageInputError, ValueError), match=message):
        check_inputs(parse_arguments(tiny.flags(stage, tiny.base, tmp_path / "out", **flags)))


def test_a_router_that_is_there_is_not_replaced(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, "router", tiny.base, tmp_path / "router", router="static")
    words = tiny.flags("router", tmp_path / "router", tmp_path / "out", router="random")
    with pytest.raises(StageInputError, match="--router random was given, but .* has a router already"):
        check_inputs(parse_arguments(words))
