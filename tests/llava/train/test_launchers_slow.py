"""Two-rank ZeRO-3 launches by every launcher: the same losses, and nothing left behind however they end."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from launching import ROOT, Launch, choose_port, is_free
from tiny_training import Tiny

pytestmark = pytest.mark.slow

LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
FLAGS = ["--warmup_ratio", "0", "--mm_vision_select_layer", "-1", "--model_max_length", "512", "--disable_tqdm", "True"]


def start(tiny: Tiny, output: Path, steps: int = 3, flags: tuple[str, ...] = (), **variables: object) -> Launch:
    """Start the stage ``dense`` on two ranks by scripts/v1_5/finetune_task.sh."""
    values = {
        "MODEL_PATH": tiny.base,
        "DATA_PATH": tiny.data,
        "IMAGE_FOLDER": tiny.images,
        "OUTPUT": output,
        "VERSION": "digits",
        "GLOBAL_BATCH": 4,
        "PER_DEVICE_BATCH": 1,
        "NUM_WORKERS": 0,
        "SKIP_DATA_CHECK": 1,
        **variables,
    }
    command = ["bash", ROOT / "scripts" / "v1_5" / "finetune_task.sh", *FLAGS, "--max_steps", str(steps), *flags]
    return Launch(command, **{name: str(value) for name, value in values.items()})


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three outputs, one by each launcher; they ran side by side, each at a port of its own choice."""
    folder = tmp_path_factory.mktemp("launchers")
    launches = {name: start(tiny, folder / name, LAUNCHER=name) for name in LAUNCHERS}
    try:
        for launch in launches.values():
            code, output = launch.finish(600)
            assert code == 0, output[-6000:]
    finally:
        for launch in launches.values():
            launch.kill()
    return folder


def read_losses(folder: Path) -> list[float]:
    """Losses of the steps of a stage."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_side_by_side_give_the_same_losses(trained: Path, launcher: str) -> None:
    summary = json.loads((trained / launcher / "stage.json").read_text())
    found = [summary[key] for key in ("engine", "zero_stage", "world_size", "global_batch")]
    assert found == ["DeepSpeedEngine", 3, 2, 4]
    assert len(read_losses(trained / launcher)) == 3
    assert read_losses(trained / launcher) == read_losses(trained / "deepspeed")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_one_launcher_finished_is_reused_by_another(tiny: Tiny, trained: Path, launcher: str) -> None:
    code, output = start(tiny, trained / "torchrun", LAUNCHER=launcher).finish(600)
    assert code == 0 and f"dense: finished before, reused from {trained / 'torchrun'}" in output, output


def test_two_nodes_train_as_two_ranks_of_one_and_node_0_writes(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    cluster = {"LAUNCHER": "torchrun", "NUM_NODES": 2, "NUM_RANKS_CPU": 1, "MASTER_ADDR": "127.0.0.1"}
    output, port = tmp_path / "output", choose_port()
    for is_first in (True, False):
        nodes = [start(tiny, output, **cluster, NODE_RANK=rank, MASTER_PORT=port) for rank in (1, 0)]
        try:
            for code, printed in [node.finish(600) for node in nodes]:
                assert code == 0 and ("reused from" in printed) != is_first, printed[-6000:]
        finally:
            for node in nodes:
                node.kill()
        assert is_free(port)
    assert json.loads((output / "stage.json").read_text())["world_size"] == 2
    assert read_losses(output) == read_losses(trained / "deepspeed")
    run_hashes = [(folder / "run_hash").read_text() for folder in (output, trained / "deepspeed")]
    assert run_hashes[0] == run_hashes[1], "a stage of two ranks is the same on one node and on two"


def wait_for_step(launch: Launch, output: Path) -> None:
    """Wait until a launch has logged its first step."""
    deadline = time.monotonic() + 300
    while launch.process.poll() is None and time.monotonic() < deadline:
        if (output.with_name(f"{output.name}.partial") / "metrics.jsonl").exists():
            return
        time.sleep(0.05)
    launch.kill()
    raise AssertionError(f"no step was taken:\n{launch.process.communicate()[0][-6000:]}")


def end(tiny: Tiny, folder: Path, how: str, **variables: object) -> tuple[Launch, str]:
    """Start a launch that ends in some way before its time, and what it says then."""
    output = folder / "output"
    if how == "refused":
        return start(tiny, output, flags=("--lora_r", "4"), **variables), "--lora_r 4 was given"
    if how == "failed":  # one rank cannot read an image, the other waits for its gradients
        records = json.loads(tiny.data.read_text())
        (folder / "broken.png").write_bytes(b"no image")
        next(record for record in records if "image" in record)["image"] = str(folder / "broken.png")
        (folder / "data.json").write_text(json.dumps(records))
        return start(tiny, output, 9, DATA_PATH=folder / "data.json", **variables), "broken.png"
    launch = start(tiny, output, 10_000, **variables)
    wait_for_step(launch, output)
    rank = launch.ranks()[1]
    (rank if how == "rank killed" else rank.parent()).kill()
    return launch, ""


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("how", ["refused", "failed", "rank killed", "launcher killed"])
def test_a_launch_that_ends_early_leaves_no_process_and_no_port(
    tiny: Tiny, tmp_path: Path, launcher: str, how: str
) -> None:
    port = choose_port()
    launch, message = end(tiny, tmp_path, how, LAUNCHER=launcher, MASTER_PORT=port)
    try:
        launch.process.wait(240)
        psutil.wait_procs(launch.children(), timeout=20)
        left = [child.cmdline() for child in launch.children()]
    finally:
        launch.kill()
    printed = launch.process.communicate()[0]
    code = launch.process.returncode
    assert code != 0 and message in printed, printed[-6000:]
    if how == "refused":  # other launchers than deepspeed's do not hand on what their processes end with
        assert code == (2 if launcher == "deepspeed" else 1)
    assert not left, left
    assert is_free(port), "something listens at the port of a launch that has ended"
    assert not (tmp_path / "output").exists()
