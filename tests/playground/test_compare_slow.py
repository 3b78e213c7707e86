"""Cells of the comparison, cut to two steps per stage and a few questions, run as the script runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from playground.compare.arms import Cell, cells
from playground.compare.run_cell import run_cell
from playground.compare.summary import make_runs, pick, read_cells

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = 24
NAMES = (
    "dense_0",
    "fuzzy_cost5_0",
    "static_0",
    "random_0",
    "linear_score_0",
    "roe_30_0",
    "roe_no_adapter_0",
    "fuzzy_0",
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, checkpoints and the files of some cells."""
    folder = tmp_path_factory.mktemp("compare")
    data = folder / "digits"
    python = [sys.executable]
    generate = ["-m", "playground.digits.generate", "--output", str(data), "--seed", "0", "--train", "900"]
    split = ["random_drop.py", "--input", str(data / "digits_train.json"), "--output", str(data / "stages.json")]
    split += ["--seed", "42", "--split", "router=0.3,adapter=0.3,finetune=0.4"]
    for words in (generate, split):
        subprocess.run([*python, *words], cwd=ROOT, check=True, capture_output=True, timeout=300)
    known = {cell.name: cell for cell in cells()}
    for name in NAMES:
        run_cell(shorten(known[name]), data, folder / "work", folder / "cells", QUESTIONS)
    run_cell(known["oracle_0"], data, folder / "work", folder / "cells", QUESTIONS)
    return folder


def shorten(cell: Cell) -> Cell:
    """The cell with two steps in every stage that trains."""
    stages = tuple(replace(training, steps=min(training.steps, 2)) for training in cell.arm.stages)
    return replace(cell, arm=replace(cell.arm, stages=stages))


def test_a_cell_says_what_was_run_and_what_came_of_it(ran: Path) -> None:
    for name in NAMES:
        found = json.loads((ran / "cells" / f"{name}.json").read_text())
        assert found["questions"] == QUESTIONS and len(found["commit"].removesuffix("+changes")) == 40
        for evaluation in found["evaluations"]:
            assert 0 <= evaluation["skip_rate"] <= 0.6 and evaluation["time_ratio"] > 0
        for stage in found["stages"]:
            assert stage["flags"][:2] == ["--stage", stage["stage"]] and stage["cpu_seconds"] > 0


def test_the_same_questions_are_asked_of_all_and_routers_meet_their_rates(ran: Path) -> None:
    runs = make_runs(read_cells(ran / "cells"))
    for method, rate in (("static", 0.33), ("random", 0.3), ("fuzzy", 0.3), ("linear_score", 0.3)):
        run = pick(runs, method, 0.3).loc[0]
        assert run.rate == pytest.approx(rate, abs=0.12) and len(run.correct) == QUESTIONS
    assert pick(runs, "dense", "dense").loc[0].correct.mean() > 0.8  # the base model knows the task


def test_the_oracle_answers_no_worse_than_the_model_that_it_routes(ran: Path) -> None:
    cells = read_cells(ran / "cells")
    assert (
        QUESTIONS * 53 <= cells["oracle_0"]["search_passes"] <= QUESTIONS * 68
    )  # rows of a batch may differ in what is left
    for rate in (0.2, 0.3, 0.4):
        oracle, fuzzy = (pick(make_runs(cells), method, rate).loc[0] for method in ("oracle", "fuzzy"))
        assert oracle.rate == pytest.approx(rate, abs=0.03) and oracle.correct.mean() >= fuzzy.correct.mean()


def test_a_cell_that_is_there_is_left_alone_and_an_unknown_one_refused(ran: Path) -> None:
    before = (ran / "cells" / "dense_0.json").stat().st_mtime_ns
    words = ["-m", "playground.compare", "--results", str(ran / "cells"), "--work", str(ran / "work")]
    done = subprocess.run([sys.executable, *words, "--cells", "dense_0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 cells are in" in done.stdout
    assert (ran / "cells" / "dense_0.json").stat().st_mtime_ns == before
    done = subprocess.run([sys.executable, *words, "--cells", "dens"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no cells dens" in done.stderr
