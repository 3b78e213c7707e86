"""Promises of what looks at training: numbers that add up, runs that learn nothing or stand still are ended."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerState, TrainingArguments

import zero3_cases
from fuzzyroe.routing_state import RoutingState
from llava.model.builder import load_checkpoint
from llava.report.page import write_stage_page
from llava.train import callbacks
from llava.train.arguments import parse_arguments
from llava.train.callbacks import HUNG, HangDetection, LossGuard, RoutingMeter, Throughput
from llava.train.stages import StageInputError
from llava.train.trainer import LlavaTrainer
from tiny_training import NUM_LAYERS, Tiny

SOURCES = ["coco", "text", "coco"]
SAMPLES = {"sample_index": torch.tensor([0, 1, 2])}


def two_turns() -> RoutingState:
    """Three samples under 4 layers: the first has two turns that skip layers 1 and 2, and 2; the others one turn."""
    turn_ids = torch.tensor([[0, 1, 2], [0, 1, 1], [0, 1, 1]])
    state = RoutingState(turn_ids, turn_ids < 0, turn_ids > 0, "soft", num_turns=2)
    keep = torch.ones(3, 2, NUM_LAYERS)
    keep[0, 0, 1], keep[0, :, 2], keep[1, 0, 3] = 0.0, 0.0, 0.5
    keep[1:, 1] = 0.0  # turns that these do not have
    return state.forced(keep)


def test_skip_rates_add_up_over_layers_samples_and_sources() -> None:
    meter = RoutingMeter(SOURCES.__getitem__)
    meter.on_batch_end(SAMPLES, two_turns())
    found = meter.take_metrics()
    assert found["routing/skip_rate/layer_01"] == pytest.approx(0.5 / 3)
    assert found["routing/skip_rate/layer_02"] == pytest.approx(1 / 3)
    assert found["routing/skip_rate/layer_03"] == pytest.approx(0.5 / 3)
    assert found["routing/skip_rate"] == pytest.approx((0.5 + 1 + 0.5) / 12)
    assert found["routing/keep_weight_mean"] == pytest.approx(1 - found["routing/skip_rate"])
    assert found["routing/keep_weight_entropy"] == pytest.approx(math.log(2) / NUM_LAYERS / 3)
    assert found["routing/skip_rate/source_text"] == pytest.approx(0.125)
    assert found["routing/skip_rate/source_coco"] == pytest.approx((0.375 + 0) / 2)
    assert meter.take_metrics() == {}


def test_in_hard_mode_the_last_turn_counts() -> None:
    state = two_turns()
    state.mode = "hard"
    meter = RoutingMeter(SOURCES.__getitem__)
    meter.on_batch_end(SAMPLES, state)
    found = meter.take_metrics()
    assert found["routing/skip_rate/layer_01"] == 0 and found["routing/skip_rate/layer_03"] == 0
    assert found["routing/skip_rate/layer_02"] == pytest.approx(1 / 3)
    assert found["routing/keep_weight_entropy"] == 0


def test_throughput_counts_tokens_that_are_no_padding() -> None:
    throughput = Throughput()
    throughput.on_batch_end({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    time.sleep(0.01)
    found = throughput.take_metrics()
    ratio = found["throughput/tokens_per_second"] / found["throughput/samples_per_second"]
    assert ratio == pytest.approx(2.5) and found["memory/peak_gib"] > 0
    assert throughput.take_metrics() == {}


def end_steps(guard: LossGuard, losses: list[float]) -> None:
    """Steps of one batch each, with samples 0, 1, 2, ..."""
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    for step, loss in enumerate(losses):
        guard.on_batch_end({"sample_index": torch.tensor([step])}, None, torch.tensor(loss))
        guard.on_step_end(args, TrainerState(global_step=step + 1), None)


@pytest.mark.parametrize("value, found", [(0.0, "exactly 0"), (math.nan, "nan"), (math.inf, "inf")])
def test_ten_steps_that_learn_nothing_end_a_run_and_name_their_samples(value: float, found: str) -> None:
    guard = LossGuard("sample{}".format)
    end_steps(guard, [1.0, *[value] * 9, 1.0])
    end_steps(guard, [value] * 9)
    with pytest.raises(RuntimeError, match=rf"The loss was {found} for 10 steps .*sample8, sample77\b"):
        guard.on_batch_end({"sample_index": torch.tensor([77])}, None, torch.tensor(value))
        guard.on_step_end(TrainingArguments(output_dir="unused", use_cpu=True), TrainerState(global_step=30), None)


def test_a_run_whose_loss_is_nan_is_ended(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlavaTrainer.training_step

    def broken(self: LlavaTrainer, model: torch.nn.Module, *args: object) -> torch.Tensor:
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(math.nan)
        return forward(self, model, *args)

    monkeypatch.setattr(LlavaTrainer, "training_step", broken)
    try:
        with pytest.raises(RuntimeError, match=r"The loss was nan for 10 steps .*\(id "):
            zero3_cases.run_case("nan", tiny.flags("dense", tiny.base, tmp_path / "nan", max_steps=12))
    finally:
        zero3_cases.reset()
    assert not (tmp_path / "nan").exists()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(t.name == "hang-detection" for t in threading.enumerate()):
        time.sleep(0.1)
    assert not [t for t in threading.enumerate() if t.name == "hang-detection"], "it would end the process later"


def test_a_rank_that_stands_still_names_layer_and_batch(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    model, codes = load_checkpoint(tiny.base).model, []
    detection = HangDetection(model, 0.4, "sample{}".format, 3)
    monkeypatch.setattr(callbacks, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(callbacks.os, "_exit", lambda code: (codes.append(code), detection._stop.set()))
    args, state = TrainingArguments(output_dir="unused", use_cpu=True), TrainerState(global_step=7)
    detection.on_train_begin(args, state, None)
    detection.on_step_begin(args, state, None)
    ids = torch.tensor([[5, 6, 7]])
    detection.on_batch_begin({"input_ids": ids, "sample_index": torch.tensor([12])})

    def stand_still(module: torch.nn.Module, args: tuple) -> None:
        deadline = time.monotonic() + 20
        while not codes and time.monotonic() < deadline:
            time.sleep(0.02)

    model.get_decoder().layers[2].mlp.register_forward_pre_hook(stand_still)
    model(input_ids=ids)
    assert codes == [HUNG]
    printed = capsys.readouterr().err
    assert "rank 3: no progress for 0.4 s at step 7, last seen at decoder layer 2" in printed
    assert "samples sample12; without images; (B, N) = (1, 3)" in printed


@pytest.mark.parametrize("stage", ["dense", "router", "roe_finetune"])
def test_hard_skipping_is_refused_where_nothing_is_planned(tiny: Tiny, tmp_path: Path, stage: str) -> None:
    with pytest.raises(StageInputError, match=f"--train_hard_skip True .* stage {stage} .*adapter, finetune"):
        parse_arguments(tiny.flags(stage, tiny.base, tmp_path / "output", train_hard_skip=True))


def test_a_stage_writes_a_report_of_its_own_numbers(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    zero3_cases.run_case("adapter", tiny.flags("adapter", tiny.base, output, skip_pattern="random", max_steps=2))
    zero3_cases.reset()
    page = (output / "report.html").read_text()
    assert "<h1>Stage adapter</h1>" in page and "Skip rate by layer" in page and "Skip rate by source" in page
    assert not re.search(r"(src|href|srcset)=['\"](?!data:)", page) and "<script" not in page
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if line["step"] == 2)
    assert {f"routing/skip_rate/layer_{layer:02d}" for layer in range(NUM_LAYERS)} <= last.keys()
    assert last["routing/skip_rate/layer_00"] == 0 and last["throughput/tokens_per_second"] > 0
    (output / "stage.json").write_text('{"stage": "router"}')
    (output / "metrics.jsonl").unlink()
    assert "<h2>Loss" not in write_stage_page(output).read_text()
