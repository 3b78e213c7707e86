"""Workers that are forked from a server which has imported what they need."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from llava.data.workers import MODULES

PROGRAM = """
import multiprocessing
import sys

from llava.data.workers import MODULES, preload_fork_server

def missing(names):
    return [name for name in names if name not in sys.modules]

if __name__ == "__main__":
    preload_fork_server()
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(pool.apply(missing, [MODULES]), "torch" in sys.modules)
"""


def test_every_module_can_be_imported() -> None:
    assert all(importlib.import_module(name) for name in MODULES)


@pytest.mark.slow
def test_a_worker_finds_everything_imported_and_its_parent_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=240)
    assert done.stdout == "[] False\n", done.stderr
