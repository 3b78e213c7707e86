"""Stages killed -9 on two ranks under DeepSpeed ZeRO-3, each kind once at a random moment: they go on as if unharmed.

``scripts/bench/kill_resume.py`` kills each eight times. One launch for all cases: the ranks are forked off a process
that has imported everything.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llava.model.builder import load_checkpoint
from scripts.bench.kill_resume import CASES, ZERO3, build_plan, compare, find_missed, run_plan, without_output
from tiny_training import Tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which every case has run twice, once undisturbed and once killed."""
    folder, seed = tmp_path_factory.mktemp("killed"), random.SystemRandom().randrange(2**31)
    print(f"seed of the kills: {seed}")
    plan = build_plan(tiny, folder, tuple(CASES), 1, seed)
    flags = without_output(tiny.flags("dense", tiny.base, folder, deepspeed=ZERO3, watchdog_seconds=4))
    run_plan([*plan, {"name": "hang", "flags": flags, "hangs": True}], folder, print)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_a_random_moment_takes_the_steps_of_an_undisturbed_one(killed: Path, name: str) -> None:
    result = compare(killed, name)
    assert find_missed(name, result) == [] and len(result["kills"]) == 1, result
    load_checkpoint(killed / name)


def test_some_kills_left_a_step_to_go_on_from_and_some_fell_into_a_save(killed: Path) -> None:
    kills = [kill for name in CASES for kill in compare(killed, name)["kills"]]
    assert any(kill["steps"] for kill in kills), "no kill left a step to go on from"
    assert any(kill["unfinished"] for kill in kills), "no kill fell into a save"


def test_ranks_that_wait_for_each_other_end_and_name_where(killed: Path) -> None:
    printed = (killed / "hang.log").read_text()
    for rank in range(2):
        found = [line for line in printed.splitlines() if f"rank {rank}: no progress for 4 s at step 1" in line]
        assert len(found) == 1 and "the start of the forward pass" in found[0] and "(id " in found[0], printed[-3000:]
