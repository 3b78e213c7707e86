"""Promises of step checkpoints: whole or passed over, of this run or refused, exact when resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

import zero3_cases
from llava.data.dataset import ModalityLengthSampler
from llava.model.builder import load_checkpoint
from llava.train.arguments import parse_arguments
from llava.train.callbacks import MetricsFile
from llava.train.checkpointing import (
    MANIFEST,
    StepCheckpoints,
    describe_run,
    find_fault,
    find_resume,
    list_checkpoints,
    publish,
    rotate,
)
from llava.train.stages import StageInputError
from tiny_training import Tiny

RUN = {"stage": "adapter", "world_size": 2, "seed": 0}


class Killed(Exception):
    """Stands for the end of a process, in one that goes on."""


def write_step(partial: Path, step: int, run: dict | None = None) -> Path:
    """A published step checkpoint with two small files."""
    folder = partial / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / f"global_step{step}" / "rank0.pt").write_bytes(b"0123456789")
    return publish(folder, RUN if run is None else run, {"moved": {}})


def test_auto_takes_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert find_resume("auto", tmp_path, RUN) is None
    for step in (2, 10, 9):
        write_step(tmp_path, step)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert find_resume("auto", tmp_path, RUN) == tmp_path / "checkpoint-10"
    assert find_resume("none", tmp_path, RUN) is None
    assert find_resume(str(tmp_path / "checkpoint-2"), tmp_path, RUN) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("damage, fault", [
    (lambda folder: (folder / MANIFEST).unlink(), "cannot be read"),
    (lambda folder: (folder / MANIFEST).write_text('{"run": {'), "cannot be read"),
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / "global_step3" / "rank0.pt").write_bytes(b"0123"), "4 of 10 bytes"),
])  # fmt: skip
def test_a_torn_checkpoint_is_found_out_and_passed_over(tmp_path: Path, damage, fault: str) -> None:
    write_step(tmp_path, 2)
    torn = write_step(tmp_path, 3)
    damage(torn)
    assert fault in find_fault(torn)
    assert find_resume("auto", tmp_path, RUN) == tmp_path / "checkpoint-2"
    with pytest.raises(StageInputError, match="no whole step checkpoint"):
        find_resume(str(torn), tmp_path, RUN)


def test_what_was_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir(parents=True)
    assert find_resume("auto", tmp_path, RUN) is None


@pytest.mark.parametrize("change, message", [
    ({"stage": "finetune"}, "saved by stage adapter, this is stage finetune"),
    ({"world_size": 1}, "saved by 2 processes, there are 1 now"),
    ({"seed": 7}, r"seed 0 \(now 7\)"),
])  # fmt: skip
def test_another_runs_checkpoint_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    folder = write_step(tmp_path, 3)
    for asked in ("auto", str(folder)):
        with pytest.raises(StageInputError, match=message):
            find_resume(asked, tmp_path, {**RUN, **change})


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_step(tmp_path, step)
    rotate(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 3
    rotate(tmp_path, 1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_metrics_of_steps_that_are_taken_again_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.9}\n{"step": 3, "loss": 0.8}\n{"step": 4, "lo')
    state = type("State", (), {"is_world_process_zero": True, "global_step": 2})()
    MetricsFile(file).on_train_begin(None, state, None)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_an_epochs_order_does_not_depend_on_the_epochs_drawn_before() -> None:
    def order(epochs: list[int]) -> list[int]:
        sampler = ModalityLengthSampler(list(range(1, 41)), 4, torch.Generator().manual_seed(3))
        for epoch in epochs:
            sampler.set_epoch(epoch)
            last = list(sampler)
        return last

    assert order([0, 1, 2]) == order([2]) != order([1])


def run_until(name: str, flags: list[str], step: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a stage in this process; end it once the checkpoint of a step is saved, if one is given."""
    on_save = StepCheckpoints.on_save

    def save_and_end(self: StepCheckpoints, args: object, state: TrainerState, control: object, **kwargs: object):
        on_save(self, args, state, control)
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(StepCheckpoints, "on_save", save_and_end)
        try:
            zero3_cases.run_case(name, flags)
        except Killed:
            assert step is not None
    zero3_cases.reset()


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every logging step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("options", [
    {"stage": "adapter", "skip_pattern": "random", "train_hard_skip": True},
    {"stage": "roe_adapter", "group_by_modality_length": True},
    {"stage": "dense", "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "resume_at": 5},
    {"stage": "dense", "per_device_train_batch_size": 12, "group_by_modality_length": True, "resume_at": 4},
], ids=["hard skip", "drawn skips", "second epoch", "second epoch by length"])  # fmt: skip
def test_a_resumed_run_takes_the_steps_of_a_whole_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **options}
    stage, step = more.pop("stage"), more.pop("resume_at", 3)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_until("whole", tiny.flags(stage, tiny.base, whole, **more), None, monkeypatch)
    run_until("resumed", tiny.flags(stage, tiny.base, resumed, **more), step, monkeypatch)
    assert load_checkpoint(tmp_path / "resumed.partial" / f"checkpoint-{step}").model is not None
    run_until("resumed", tiny.flags(stage, tiny.base, resumed, **more), None, monkeypatch)
    assert json.loads((resumed / "stage.json").read_text())["resumed_at"] == step
    assert [found for found, _ in read_losses(resumed)] == [1, 2, 3, 4, 5, 6]
    assert read_losses(resumed) == [(number, pytest.approx(loss, abs=1e-6)) for number, loss in read_losses(whole)]
    ours, theirs = (load_file(tmp_path / f"{name}.gathered.safetensors") for name in ("resumed", "whole"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=0, msg=name)
    assert not list(resumed.glob("checkpoint-*"))


def test_two_runs_are_alike_only_if_their_flags_are(tiny: Tiny, tmp_path: Path) -> None:
    def described(**more: object) -> dict:
        return describe_run(parse_arguments(tiny.flags("adapter", tiny.base, tmp_path / "output", **more)))

    assert described() == described(logging_steps=5, save_steps=7)
    for name, value in (("roe_lr", 1e-3), ("max_steps", 9), ("train_hard_skip", True), ("seed", 3)):
        assert described(**{name: value}) != described(), name
