"""Workers that are forked from a server which has imported what they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import gc
import multiprocessing
import sys

from llava.data import FORK_SERVER_MODULES

def look(index):
    before = set(sys.modules)
    from llava.data.fork_server import MODULES
    return set(MODULES) <= before and gc.get_freeze_count() > 10_000

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(FORK_SERVER_MODULES)
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(pool.map(look, [0]), "torch" in sys.modules)
"""


@pytest.mark.slow
def test_a_worker_finds_everything_imported_and_its_parent_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=400)
    assert done.stdout == "[True] False\n", done.stderr
