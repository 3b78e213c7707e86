"""Promises of objectives: one more is a function and a line; adapters learn what their layers give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import zero3_cases
from fuzzyroe.attach import attach
from fuzzyroe.routing_state import RoutingState
from llava.model.builder import load_checkpoint
from llava.train.arguments import parse_arguments
from llava.train.checks import check_inputs
from llava.train.objectives import OBJECTIVES, layer_regression, run_model
from tiny_training import NUM_LAYERS, Tiny


def mean_square_of_logits(model: Any, batch: dict[str, Any], routing: RoutingState | None, *, roe_lr: float) -> Any:
    """A toy objective that reads a flag, ignores the answers and logs the skip rate of each sample."""
    logits = run_model(model, {name: value for name, value in batch.items() if name != "labels"}, routing).logits
    turns = routing.turn_mask()  # (B, T)
    skipped = (1 - routing.result.keep_weights.mean(dim=2)) * turns
    return roe_lr * logits.square().mean(), {"toy/skipped": skipped.sum(dim=1) / turns.sum(dim=1)}


def test_an_objective_is_a_function_and_a_line(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "toy", mean_square_of_logits)
    more = {"objective": "toy", "skip_pattern": "random", "max_steps": 2, "per_device_train_batch_size": 4}
    flags = tiny.flags("adapter", tiny.base, tmp_path / "adapter", **more)
    check_inputs(parse_arguments(flags))
    zero3_cases.run_case("adapter", flags)
    zero3_cases.reset()
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2 and steps[1]["loss"] < steps[0]["loss"]
    assert all(line["toy/skipped"] == pytest.approx(line["routing/skip_rate"]) for line in steps)
    assert json.loads((tmp_path / "adapter" / "stage.json").read_text())["moved"]["adapter"]


def test_an_objective_that_is_unknown_or_reads_flags_of_other_stages_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="--objective none is unknown; use one of language_model, roe, layer_regression"
    ):
        parse_arguments(tiny.flags("dense", tiny.base, tmp_path / "output", objective="none"))
    with pytest.raises(ValueError, match="--objective roe was given, but it reads --skip_loss_weight"):
        parse_arguments(tiny.flags("adapter", tiny.base, tmp_path / "output", objective="roe"))


def test_the_loss_is_one_for_an_untrained_adapter_and_ignores_padding(tiny: Tiny) -> None:
    model = attach(load_checkpoint(tiny.base).model, 8).train()
    ids = torch.tensor([[5, 6, 7, 3, 3], [8, 9, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss = layer_regression(model, {"input_ids": ids, "attention_mask": mask}, None)
    assert float(loss) == pytest.approx(1.0)
    for layer in model.get_decoder().layers:
        torch.nn.init.normal_(layer.adapter.up.weight)
    changed = layer_regression(model, {"input_ids": ids, "attention_mask": mask}, None)
    padded = layer_regression(
        model, {"input_ids": ids.index_fill(1, torch.tensor([4]), 9), "attention_mask": mask}, None
    )
    assert float(changed) > 1.0
    assert float(padded) != float(changed), "the last position of the second row is no padding"
    other = ids.clone()
    other[0, 3:] = 9
    same = layer_regression(model, {"input_ids": other, "attention_mask": mask}, None)
    torch.testing.assert_close(same, changed)


def test_a_stage_of_layer_regression_moves_every_adapter_and_lowers_the_loss(tiny: Tiny, tmp_path: Path) -> None:
    flags = tiny.flags(
        "adapter",
        tiny.base,
        tmp_path / "adapter",
        objective="layer_regression",
        max_steps=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    check_inputs(parse_arguments(flags))
    zero3_cases.run_case("adapter", flags)
    zero3_cases.reset()
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(1.0) and losses[-1] < 0.9
    model = load_checkpoint(tmp_path / "adapter").model
    assert all(layer.adapter.up.weight.any() for layer in model.get_decoder().layers)
    assert len(model.get_decoder().layers) == NUM_LAYERS


@pytest.mark.parametrize("stage, flags, message", [
    ("finetune", {}, "trains adapters alone, not stage finetune"),
    ("adapter", {"train_hard_skip": True}, "skips nothing while it trains"),
    ("adapter", {"skip_pattern": "random"}, "skips nothing while it trains"),
])  # fmt: skip
def test_flags_that_contradict_layer_regression_are_refused(
    tiny: Tiny, tmp_path: Path, stage: str, flags: dict, message: str
) -> None:
    flags = {"objective": "layer_regression", "skip_data_check": True, **flags}
    with pytest.raises(ValueError, match=message):
        check_inputs(parse_arguments(tiny.flags(stage, tiny.base, tmp_path / "output", **flags)))
