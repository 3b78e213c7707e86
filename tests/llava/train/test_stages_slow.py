"""The stage scripts from beginning to end: finished, reused, killed, refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from bad_inputs import DATA, STAGE
from launching import ROOT, Launch
from llava.model.builder import load_checkpoint
from tiny_training import ADAPTER_WIDTH, Tiny

pytestmark = pytest.mark.slow

STAGES = ("router", "adapter", "finetune")
SHARED = ["--dataloader_num_workers", "0", "--order_samples", "8", "--disable_tqdm", "True"]
VARIABLES = {
    "data_path": "DATA_PATH",
    "image_folder": "IMAGE_FOLDER",
    "version": "VERSION",
    "model_name_or_path": "MODEL_PATH",
    "output_dir": "OUTPUT",
    "deepspeed": "ZERO_CONFIG",
}
"""What is an environment variable of the scripts; other flags are arguments."""

BY_SCRIPT = ("broken json", "missing image", "unknown template", "model folder missing", "few records")
"""Bad input that is given to a script; test_refusals.py gives every kind to the program that the scripts launch."""


def start(script: str, tiny: Tiny, arguments: list[str] | None = None, **variables: object) -> Launch:
    """Start a script of scripts/v1_5 on the tiny data."""
    values = {
        "IMAGE_FOLDER": tiny.images,
        "DATA_PATH": tiny.data,
        "VERSION": "digits",
        "GLOBAL_BATCH": 4,
        "PER_DEVICE_BATCH": 1,
        "ADAPTER_HIDDEN_DIM": ADAPTER_WIDTH,
        "SPLIT": "router=0.4,adapter=0.3,finetune=0.3",
        "SKIP_RATIO": 0.25,
        "ATTEMPTS": 1,
        **variables,
    }
    command = ["bash", ROOT / "scripts" / "v1_5" / f"{script}.sh", *(SHARED if arguments is None else arguments)]
    return Launch(command, **{name: None if value is None else str(value) for name, value in values.items()})


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the three folders that scripts/v1_5/train_all.sh wrote."""
    prefix = tmp_path_factory.mktemp("stages") / "tiny"
    code, output = start("train_all", tiny, MODEL_PATH=tiny.base, OUTPUT=prefix).finish(900)
    assert code == 0, output[-6000:]
    return prefix


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def words(output: str) -> str:
    """What was printed, with single spaces."""
    return " ".join(output.split())


def test_the_scripts_run_all_stages_under_zero3(trained: Path) -> None:
    for stage in STAGES:
        folder = trained.with_name(f"tiny-{stage}")
        summary = json.loads((folder / "stage.json").read_text())
        assert (summary["stage"], summary["engine"], summary["zero_stage"], summary["world_size"]) == (
            stage, "DeepSpeedEngine", 3, 2
        )  # fmt: skip
        assert load_checkpoint(folder).routing.stage == stage
    assert summary["global_batch"] == 4
    assert not list(trained.parent.glob("*.partial"))


def test_a_second_run_reuses_every_stage(tiny: Tiny, trained: Path) -> None:
    before = digest(trained.parent)
    code, output = start("train_all", tiny, MODEL_PATH=tiny.base, OUTPUT=trained).finish(600)
    assert code == 0, output
    for stage in STAGES:
        assert f"[fuzzyroe_{stage}] {stage}: finished before, reused from {trained}-{stage}" in output
    assert digest(trained.parent) == before


@pytest.mark.parametrize("change", [{"SKIP_RATIO": 0.2}, {"VERSION": "plain"}, {"FRESH": 1}, {"NUM_RANKS_CPU": 1}])
def test_other_settings_are_not_reused(tiny: Tiny, trained: Path, change: dict[str, object]) -> None:
    router = trained.with_name("tiny-router")
    before = digest(router)
    with socket.socket() as taken:  # so that nothing is launched
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = {"DATA_PATH": f"{trained}-data/data.router.json", "OUTPUT": router, "MODEL_PATH": tiny.base}
        port = taken.getsockname()[1]
        launch = start("fuzzyroe_router", tiny, MASTER_PORT=port, SKIP_DATA_CHECK=1, **{**settings, **change})
        code, output = launch.finish(600)
    assert code == 2 and "MASTER_PORT" in output and "reused" not in output, output
    assert digest(router) == before


def wait_for(launch: Launch, moment: float | Path) -> None:
    """Wait some seconds, or until a file is there; at most until the launch ends."""
    deadline = time.monotonic() + (moment if isinstance(moment, float) else 60)
    while time.monotonic() < deadline and launch.process.poll() is None:
        if isinstance(moment, Path) and moment.exists():
            return
        time.sleep(0.005)


def test_a_killed_stage_leaves_the_earlier_output_whole_and_can_be_run_again(
    tiny: Tiny, trained: Path, tmp_path: Path
) -> None:
    for name in ("base", "tiny-router", "tiny-adapter"):
        source = tiny.base if name == "base" else trained.with_name(name)
        shutil.copytree(source, tmp_path / name)
    router, adapter, partial = (tmp_path / name for name in ("tiny-router", "tiny-adapter", "tiny-adapter.partial"))
    config = json.loads((router / "config.json").read_text())
    config["fuzzyroe"]["base_model"] = "../base"
    (router / "config.json").write_text(json.dumps(config))
    router_before, adapter_before = digest(router), digest(adapter)
    settings = {"MODEL_PATH": router, "OUTPUT": adapter, "DATA_PATH": f"{trained}-data/data.adapter.json", "FRESH": 1}
    settings |= {"SKIP_DATA_CHECK": 1}
    generator = random.Random(0)
    for moment in (generator.uniform(2, 9), partial / "routing.safetensors"):
        launch = start("fuzzyroe_adapter", tiny, **settings)
        wait_for(launch, moment)
        os.killpg(launch.process.pid, signal.SIGKILL)
        launch.process.communicate()
        psutil.wait_procs(launch.children(), timeout=10)
        assert not launch.children(), "a process outlived the kill of its group"
        whole = adapter if adapter.exists() else adapter.with_name("tiny-adapter.old")
        assert digest(whole) == adapter_before or moment == partial / "routing.safetensors"
        assert load_checkpoint(whole).routing.stage == "adapter"
    was_interrupted = partial.exists()
    code, output = start("fuzzyroe_adapter", tiny, **settings).finish(600)
    assert code == 0, output[-6000:]
    assert ("an earlier run was interrupted" in output) == was_interrupted
    assert digest(router) == router_before
    assert load_checkpoint(adapter).routing.stage == "adapter"
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.old"))


def test_an_output_killed_while_being_replaced_is_put_back(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    router, old = trained.with_name("tiny-router"), trained.with_name("tiny-router.old")
    before = digest(router)
    router.rename(old)  # what a kill between the two renames of a replacement leaves
    code, output = start("train_all", tiny, MODEL_PATH=tiny.base, OUTPUT=trained).finish(600)
    assert code == 0 and output.count("reused from") == 3, output
    assert digest(router) == before and not old.exists()


def test_a_launcher_killed_alone_makes_the_script_fail_and_ends_the_ranks(
    tiny: Tiny, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "router"
    shutil.copytree(trained.with_name("tiny-router"), output)
    (output / "run_hash").write_text("of other settings\n")
    before = digest(output)
    launch = start("fuzzyroe_router", tiny, MODEL_PATH=tiny.base, OUTPUT=output, SKIP_DATA_CHECK=1)
    try:
        launchers: list[psutil.Process] = []
        deadline = time.monotonic() + 120
        while not launchers and time.monotonic() < deadline and launch.process.poll() is None:
            found = [child for child in launch.children() if "deepspeed.launcher.launch" in child.cmdline()]
            launchers = [child for child in found if len(child.children()) == 2]
            time.sleep(0.05)
        time.sleep(2)  # the ranks have begun
        for launcher in launchers:
            launcher.kill()
        code = launch.process.wait(30)
        psutil.wait_procs(launch.children(), timeout=20)
        left = [child.cmdline() for child in launch.children()]
    finally:
        launch.kill()
    printed = launch.process.communicate()[0]
    assert launchers and not left, left
    assert code != 0 and f"router ended without writing {output}" in printed, printed
    assert digest(output) == before


@pytest.mark.parametrize("name", BY_SCRIPT)
def test_a_script_refuses_bad_input_with_exit_code_2(tiny: Tiny, tmp_path: Path, name: str) -> None:
    case = {**DATA, **STAGE}[name]
    earlier = tmp_path / "output"
    earlier.mkdir()
    (earlier / "stage.json").write_text("{}\n")
    before = digest(earlier)
    (tmp_path / "input").mkdir()
    changes = {"model_name_or_path": tiny.base, "output_dir": earlier, **case.changes(tiny, tmp_path / "input")}
    variables = {VARIABLES[flag]: value for flag, value in changes.items() if flag in VARIABLES}
    arguments = [f"--{flag}={value}" for flag, value in changes.items() if flag not in VARIABLES]
    code, output = start("fuzzyroe_router", tiny, [*SHARED, *arguments], **variables).finish(600)
    assert code == 2, (code, output)
    assert re.search(case.message, words(output)), output
    assert "Traceback" not in output and "Loading weights" not in output, output
    is_launched = name in STAGE and name != "model folder missing"  # its tokenizer measures the data
    assert ("processes, global batch" in output) == is_launched, "data is looked at before anything is launched"
    assert digest(earlier) == before
    assert not list(tmp_path.glob("output.*"))


def test_a_script_refuses_to_start_without_deepspeed(tiny: Tiny, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    python = programs / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    without = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "deepspeed").exists()]
    launch = start(
        "fuzzyroe_router",
        tiny,
        MODEL_PATH=tiny.base,
        OUTPUT=tmp_path / "output",
        FUZZYROE_PYTHON=python,
        PATH=os.pathsep.join(without),
    )
    code, output = launch.finish(600)
    assert code == 2 and "DeepSpeed is not installed in this environment" in output, output
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("change, message", [
    ({"GLOBAL_BATCH": 3}, "GLOBAL_BATCH 3 is no multiple"),
    ({"DATA_PATH": None}, "DATA_PATH is not set"),
    ({"MASTER_PORT": "many"}, "MASTER_PORT many"),
])  # fmt: skip
def test_a_script_names_the_variable_that_is_wrong(
    tiny: Tiny, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    launch = start("fuzzyroe_router", tiny, **{"MODEL_PATH": tiny.base, "OUTPUT": tmp_path / "output", **change})
    code, output = launch.finish(600)
    assert code != 0 and message in output, output
    assert not (tmp_path / "output").exists()
