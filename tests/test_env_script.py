"""scripts/env.sh in a copy of the repository where a stand-in plays Python, so that nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `-m venv` copies the stand-in, `-m pip` writes down what it was asked for, anything else is real Python.
STAND_IN = f"""#!/usr/bin/env bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip "*) echo "$*" >>"$CALLS"; [[ -z "${{FAIL_ON:-}}" || "$*" != *"$FAIL_ON"* ]] ;;
  *check_environment.py*) [[ "$*" != *--broken-companions* ]] || printf '%s' "${{BROKEN:-}}" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A copy of what env.sh reads, and the calls that its pip received."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.calls = folder / "calls"
        self.programs = folder / "programs"
        (self.root / "scripts").mkdir(parents=True)
        self.programs.mkdir()
        for name in (
            "scripts/env.sh",
            "scripts/check_environment.py",
            "requirements.txt",
            "requirements.lock",
            "pyproject.toml",
        ):
            shutil.copy(ROOT / name, self.root / name)
        self.python = self.programs / "python3"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def run(self, program: str = "source scripts/env.sh", **variables: str) -> subprocess.CompletedProcess:
        """Run a line of shell in the checkout."""
        ours = ("FUZZYROE_", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        environment["PATH"] = f"{self.programs}:{environment['PATH']}"
        environment["CALLS"] = str(self.calls)
        environment["FUZZYROE_TORCH_INDEX"] = "https://index.invalid"
        self.calls.write_text("")
        return subprocess.run(
            ["bash", "-c", program], cwd=self.root, env={**environment, **variables}, capture_output=True, text=True
        )

    def installs(self) -> list[str]:
        """What pip was asked to install or remove in the last run."""
        return self.calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fresh checkout without .venv."""
    return Checkout(tmp_path)


def test_torch_comes_first_and_the_rest_by_the_hashes_of_the_lock(checkout: Checkout) -> None:
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    torch, locked, repository = checkout.installs()
    assert "torch==" in torch and "--extra-index-url https://index.invalid" in torch
    assert "--no-deps --require-hashes -r requirements.lock" in locked
    assert repository.endswith("--no-deps -e .")


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.run()
    result = checkout.run()
    assert result.returncode == 0
    assert checkout.installs() == []
    assert "up to date" in result.stdout


@pytest.mark.parametrize("name", ["requirements.txt", "requirements.lock", "pyproject.toml"])
def test_a_changed_requirement_is_installed_into_the_same_environment(checkout: Checkout, name: str) -> None:
    checkout.run()
    kept = checkout.root / ".venv" / "kept"
    kept.touch()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.run()
    assert len(checkout.installs()) == 3
    assert kept.exists()


def test_an_interrupted_install_is_repaired_by_the_next_run(checkout: Checkout) -> None:
    broken = checkout.run(FAIL_ON="requirements.lock")
    assert broken.returncode == 1
    assert "run the same command again" in broken.stderr
    leftover = checkout.root / ".venv" / "leftover"
    leftover.touch()
    repaired = checkout.run()
    assert repaired.returncode == 0, repaired.stderr
    assert "did not finish" in repaired.stdout
    assert len(checkout.installs()) == 3
    assert not leftover.exists()


def test_an_environment_that_this_script_did_not_make_is_not_deleted(checkout: Checkout) -> None:
    theirs = checkout.root / ".venv" / "notes.txt"
    theirs.parent.mkdir()
    theirs.touch()
    result = checkout.run()
    assert result.returncode == 1
    assert "move it away" in result.stderr
    assert theirs.exists()


def test_a_companion_that_cannot_be_imported_is_removed_from_the_own_environment(checkout: Checkout) -> None:
    checkout.run()
    result = checkout.run(BROKEN="torchvision")
    assert result.returncode == 0
    assert [call.split("uninstall")[1] for call in checkout.installs()] == [" --yes torchvision"]
    assert "cannot be imported beside" in result.stdout


def test_it_works_from_any_folder_and_leaves_the_caller_in_the_root(checkout: Checkout, tmp_path: Path) -> None:
    result = checkout.run(f'cd {tmp_path}; source checkout/scripts/env.sh; echo "$PWD $PYTHON $PYTHONPATH"')
    root = checkout.root
    assert result.stdout.splitlines()[-1] == f"{root} {root}/.venv/bin/python {root}"


def test_a_given_environment_is_left_alone(checkout: Checkout) -> None:
    result = checkout.run('source scripts/env.sh; echo "$PYTHON"', FUZZYROE_PYTHON=str(checkout.python))
    assert result.stdout.splitlines()[-1] == str(checkout.python)
    assert checkout.installs() == []
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
@pytest.mark.parametrize("finding", ["", "exit 1", "echo '[env] warning: torch 2.0 is installed' >&2"])
def test_an_active_environment_is_used_if_it_is_complete(
    checkout: Checkout, tmp_path: Path, variable: str, finding: str
) -> None:
    active, is_complete = tmp_path / "active" / "bin" / "python", not finding
    active.parent.mkdir(parents=True)
    check = "*check_environment.py*)"
    active.write_text(STAND_IN.replace(check, f"{check} {finding};") if finding else STAND_IN)
    active.chmod(0o755)
    result = checkout.run('source scripts/env.sh; echo "$PYTHON"', **{variable: str(active.parent.parent)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(active if is_complete else checkout.root / ".venv" / "bin" / "python")
    assert bool(checkout.installs()) != is_complete
    assert ("lacks what is needed" in result.stderr) != is_complete


def test_a_given_environment_without_the_requirements_says_what_is_missing(checkout: Checkout) -> None:
    bare = checkout.programs / "bare"
    bare.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages
    bare.chmod(0o755)
    result = checkout.run(FUZZYROE_PYTHON=str(bare), PYTHONHOME="")
    assert result.returncode == 1
    assert "lacks torch>=2.6" in result.stderr
    assert "-m pip install 'torch>=2.6'" in result.stderr
    assert not (checkout.root / ".venv").exists()


def test_a_given_python_that_does_not_exist_is_named(checkout: Checkout) -> None:
    result = checkout.run(FUZZYROE_PYTHON="no-such-python")
    assert result.returncode == 1
    assert "FUZZYROE_PYTHON=no-such-python is no program" in result.stderr
