"""Promises of the start of training: a rank ends with its launcher, a killed build is named and not waited for."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launching import ROOT
from llava.train import train
from llava.train.zero3 import find_dead_build

RANK = """
import sys, time, unittest.mock
sys.path.insert(0, sys.argv[1])
for part in ("arguments", "checks", "stage", "stages", "zero3"):  # what takes seconds to import, and is not needed here
    sys.modules[f"llava.train.{part}"] = sys.modules["torch"] = unittest.mock.MagicMock()
from llava.train.train import watch_launcher
watch_launcher(0.05)
open(sys.argv[2], "w").close()
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@pytest.mark.parametrize("is_rank", [True, False])
def test_only_a_rank_ends_with_its_launcher(tmp_path: Path, is_rank: bool) -> None:
    started, output = tmp_path / "started", tmp_path / "output"
    environment = {"PATH": "/usr/bin:/bin", **({"LOCAL_RANK": "0", "RANK": "3"} if is_rank else {})}
    with output.open("w") as file:
        command = [sys.executable, "-c", LAUNCHER, RANK, str(ROOT), str(started)]
        launcher = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    rank = psutil.Process(launcher.pid).children()[0]
    launcher.kill()
    launcher.wait()
    gone, _ = psutil.wait_procs([rank], timeout=20 if is_rank else 1)
    try:
        assert bool(gone) == is_rank
        assert ("rank 3: the launcher" in output.read_text()) == is_rank
    finally:
        if not gone:
            rank.kill()


def test_the_lock_of_a_killed_build_is_named_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert find_dead_build() is None
    (tmp_path / "deepspeed_shm_comm").mkdir()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    with lock.open("w"):  # as torch holds it while it builds
        assert find_dead_build() is None
    assert find_dead_build() == lock
    monkeypatch.setattr(sys, "argv", ["train.py", "--deepspeed", "scripts/zero3.json"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert f"{lock} is 0 minutes old" in (printed := capsys.readouterr().err) and f"rm {lock} and start" in printed
