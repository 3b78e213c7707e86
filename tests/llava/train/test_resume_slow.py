"""Stages killed -9 on two ranks under DeepSpeed ZeRO-3, at any moment, again and again: they go on as if they had not.

One launch for all cases: the ranks are forked off a process that has imported everything.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launching import ROOT, Launch
from llava.model.builder import load_checkpoint
from llava.train.arguments import takes
from llava.train.stages import STAGES
from tiny_training import Tiny

pytestmark = pytest.mark.slow

ZERO3 = ROOT / "scripts" / "zero3.json"
KILLS = 8
STEPS = 6


@dataclass(frozen=True)
class Case:
    """A run that is killed.

    Attributes:
        stage: Name in ``STAGES``.
        start: Case whose output it starts from; None for the dense checkpoint.
        hard: Whether it leaves layers out in training.
    """

    stage: str
    start: str | None = None
    hard: bool = False


CASES = {
    "pretrain": Case("pretrain"),
    "dense": Case("dense"),
    "scratch": Case("scratch"),
    "router": Case("router"),
    "adapter": Case("adapter", "router"),
    "finetune": Case("finetune", "adapter"),
    "finetune_hard": Case("finetune", "adapter", hard=True),
    "roe_adapter": Case("roe_adapter"),
    "roe_router": Case("roe_router", "roe_adapter"),
    "roe_finetune": Case("roe_finetune", "roe_router"),
}
"""Every stage; each starts from what an undisturbed run before it in this order wrote."""


def build_plan(tiny: Tiny, folder: Path) -> list[dict]:
    """Cases for tests/support/forked_ranks.py."""
    plan = []
    for name, case in CASES.items():
        stage = STAGES[case.stage]
        more = {
            "deepspeed": ZERO3,
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": 1,
            "skip_data_check": True,
            "calibration_samples": 16,
            "score_samples": 16,
        }
        if case.start is not None:
            more["adapter_hidden_dim"] = None
        more = {flag: value for flag, value in more.items() if takes(stage, flag)}
        if case.hard:
            more["train_hard_skip"] = True
        model = folder / f"{case.start}.whole" if case.start else tiny.base
        flags = without_output(tiny.flags(case.stage, model, folder, **more))
        plan.append({"name": name, "flags": flags, "kills": KILLS, "saves": bool(stage.trains)})
    flags = without_output(tiny.flags("dense", tiny.base, folder, deepspeed=ZERO3, watchdog_seconds=4))
    plan.append({"name": "hang", "flags": flags, "hangs": True})
    return plan


def without_output(flags: list[str]) -> list[str]:
    """Flags without the output folder, and without those that are None."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if pair[0] != "--output_dir" and pair[1] != "None" for word in pair]


@pytest.fixture(scope="module")
def killed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which every case has run twice, once undisturbed and once killed again and again."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "plan.json").write_text(json.dumps(build_plan(tiny, folder)))
    program = ROOT / "tests" / "support" / "forked_ranks.py"
    code, output = Launch([sys.executable, program, folder / "plan.json"]).finish(2400)
    assert code == 0, output[-6000:]
    return folder


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every logging step, in the order of the file."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_any_moment_takes_the_steps_of_an_undisturbed_one(killed: Path, name: str) -> None:
    whole, resumed = read_losses(killed / f"{name}.whole"), read_losses(killed / name)
    steps = list(range(1, STEPS + 1)) if STAGES[CASES[name].stage].trains else []
    assert [step for step, _ in resumed] == [step for step, _ in whole] == steps
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole], abs=1e-6)
    kills = json.loads((killed / f"{name}.kills.json").read_text())["kills"]
    assert len(kills) == KILLS and all(not kill["faults"] for kill in kills), kills
    if steps:
        assert any(kill["steps"] for kill in kills), "no kill left a step to go on from"
        assert any(kill["unfinished"] for kill in kills), "no kill fell into a save"


@pytest.mark.parametrize("name", CASES)
def test_what_a_killed_run_writes_in_the_end_is_what_an_undisturbed_one_writes(killed: Path, name: str) -> None:
    files = sorted(path.name for path in (killed / f"{name}.whole").iterdir())
    assert sorted(path.name for path in (killed / name).iterdir()) == files
    for file in (killed / name).glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(killed / f"{name}.whole" / file.name)
        assert ours.keys() == theirs.keys()
        for tensor_name, tensor in ours.items():
            assert (tensor.double() - theirs[tensor_name].double()).abs().max() <= 1e-6, tensor_name
    load_checkpoint(killed / name)
    assert not [path for path in killed.glob(f"{name}.*") if path.suffix in (".partial", ".old")]


def test_ranks_that_wait_for_each_other_end_and_name_where(killed: Path) -> None:
    printed = (killed / "hang.log").read_text()
    for rank in range(2):
        found = [line for line in printed.splitlines() if f"rank {rank}: no progress for 4 s at step 1" in line]
        assert len(found) == 1 and "the start of the forward pass" in found[0] and "(id " in found[0], printed[-3000:]
