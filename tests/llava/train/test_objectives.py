"""Promises of adapters that learn to forecast their layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zero3_cases
from fuzzyroe.attach import attach
from llava.model.builder import load_checkpoint
from llava.train.arguments import parse_arguments
from llava.train.checks import check_inputs
from llava.train.objectives import layer_regression
from tiny_training import NUM_LAYERS, Tiny


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


def test_a_stage_of_forecasts_moves_every_adapter_and_lowers_the_loss(tiny: Tiny, tmp_path: Path) -> None:
    flags = tiny.flags(
        "adapter",
        tiny.base,
        tmp_path / "adapter",
        adapter_objective="forecast",
        max_steps=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    check_inputs(*parse_arguments(flags))
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
def test_flags_that_contradict_forecasts_are_refused(
    tiny: Tiny, tmp_path: Path, stage: str, flags: dict, message: str
) -> None:
    flags = {"adapter_objective": "forecast", "skip_data_check": True, **flags}
    with pytest.raises(ValueError, match=message):
        check_inputs(*parse_arguments(tiny.flags(stage, tiny.base, tmp_path / "output", **flags)))
