"""A rank ends when its launcher is gone; a process started by hand does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launching import ROOT

RANK = """
import sys, time, unittest.mock
sys.path.insert(0, sys.argv[1])
for part in ("arguments", "checks", "stage", "stages"):  # what takes seconds to import, and is not needed here
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
