"""The plug-in that makes a skipped test fail the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parent / "support"
HEADER = "import pytest\n"
PASSES = "def test_passes():\n    pass\n"


def run_pytest(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run the plug-in on one file of tests, away from this repository's configuration."""
    (folder / "test_example.py").write_text(HEADER + source)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {SUPPORT}\nmarkers =\n    gpu: needs CUDA\n")
    program = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, "-p", "no_skips", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "source",
    [
        "def test_skips():\n    pytest.skip('no data')\n",
        "@pytest.mark.skip(reason='no data')\ndef test_skips():\n    pass\n",
        "@pytest.fixture\ndef broken():\n    pytest.skip('no data')\ndef test_skips(broken):\n    pass\n",
        "pytest.importorskip('no_such_module', reason='no data')\n",
    ],
    ids=["in the test", "by a marker", "in a fixture", "the whole file"],
)
@pytest.mark.parametrize("arguments", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "two workers"])
def test_a_skip_fails_the_run_and_is_named(tmp_path: Path, source: str, arguments: tuple[str, ...]) -> None:
    result = run_pytest(tmp_path, source + PASSES, *arguments)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert "skipped without the marker gpu" in result.stdout
    assert "no data" in result.stdout


@pytest.mark.parametrize(
    "source",
    [
        "@pytest.mark.gpu\ndef test_skips():\n    pytest.skip('no CUDA')\n",
        "@pytest.mark.xfail(reason='known')\ndef test_expected_failure():\n    assert False\n",
        "",
    ],
    ids=["marked gpu", "expected failure", "nothing skipped"],
)
@pytest.mark.parametrize("arguments", [(), ("-p", "xdist", "-n", "2")], ids=["one process", "two workers"])
def test_what_is_allowed_passes(tmp_path: Path, source: str, arguments: tuple[str, ...]) -> None:
    result = run_pytest(tmp_path, source + PASSES, *arguments)
    assert result.returncode == pytest.ExitCode.OK, result.stdout + result.stderr


def test_a_failure_stays_a_failure(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "def test_fails():\n    assert False\n")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "skipped without" not in result.stdout
