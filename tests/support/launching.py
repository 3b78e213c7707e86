"""Running a program with all its children under a time limit, leaving none of them behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "FUZZYROE_TEST_LAUNCH"
"""Environment variable by which the children of a launch are found, whatever session or group they are in."""

OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a rank is told by its launcher; a test that runs in one process may have set it."""


class Launch:
    """A program started in a session of its own.

    Args:
        command: Program with arguments.
        **variables: Further environment variables; None removes one.
    """

    def __init__(self, command: list[str | Path], **variables: str | None) -> None:
        self.token = uuid.uuid4().hex
        inherited = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
        environment = {**inherited, **launch_environment(), **variables, MARK: self.token}
        self.command = [str(word) for word in command]
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={name: value for name, value in environment.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def finish(self, timeout: float) -> tuple[int, str]:
        """Wait for the end; exit code and what was printed.

        Raises:
            AssertionError: If it takes longer than ``timeout`` seconds, or leaves a process behind.
        """
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            output, _ = self.process.communicate()
            raise AssertionError(f"{self.command} took longer than {timeout} s:\n{output[-6000:]}") from None
        deadline = time.monotonic() + 5  # launchers reap their children a moment after they end
        while self.children() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [" ".join(child.cmdline()) for child in self.children()]
        self.kill()
        assert not left, f"{self.command} left processes behind: {left}\n{output[-6000:]}"
        return self.process.returncode, output

    def kill(self) -> None:
        """Kill -9 everything that was started, at once."""
        for child in self.children():
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(self.children(), timeout=10)

    def children(self) -> list[psutil.Process]:
        """All live processes of this launch, the program itself included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """Its live processes of llava/train/train.py, in the order of their ranks."""
        ranks = {}
        for process in self.children():
            try:
                if any(word.endswith("llava/train/train.py") for word in process.cmdline()[:3]):
                    ranks[int(process.environ()["RANK"])] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return [ranks[rank] for rank in sorted(ranks)]


def choose_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    """Whether a launch could listen at a port, which one that was closed just now allows."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def launch_environment() -> dict[str, str]:
    """What every launch runs under: offline, on the CPU, one thread per rank, the programs of this Python first."""
    return {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FUZZYROE_PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
