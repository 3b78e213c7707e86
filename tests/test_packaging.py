"""What is declared in pyproject.toml, requirements.txt and the shell scripts agrees with the code and with itself."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = CONFIG["project"]
EXTRAS = PROJECT["optional-dependencies"]
RANGES = [Requirement(line) for line in sorted({*PROJECT["dependencies"], *sum(EXTRAS.values(), [])})]
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]
ENTRY_POINTS = [*PROJECT["scripts"].values(), *PROJECT["entry-points"]["lmms_eval.models"].values()]
PYTHONS = ["3.10", "3.11", "3.12"]


def pins_for(python: str) -> dict[str, Requirement]:
    """The pins that apply to a Python version, by name."""
    applying = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    names = [pin.name for pin in applying]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return {pin.name: pin for pin in applying}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("wanted", RANGES, ids=str)
def test_every_requirement_is_pinned_inside_its_range(wanted: Requirement, python: str) -> None:
    pin = pins_for(python).get(wanted.name)
    assert pin is not None, f"requirements.txt has no pin of {wanted.name} for Python {python}"
    (version,) = [specifier.version for specifier in pin.specifier]
    assert wanted.specifier.contains(version), f"{pin} is outside {wanted}"


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_every_pin_is_exact(pin: Requirement) -> None:
    assert [specifier.operator for specifier in pin.specifier] == ["=="]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_every_pin_with_its_hash(python: str) -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(" --hash=sha256:" in line for line in lines)
    locked = [Requirement(line.split(" --hash", 1)[0]) for line in lines]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    applying = {
        canonicalize_name(pin.name): pin for pin in locked if pin.marker is None or pin.marker.evaluate(environment)
    }
    for name, pin in pins_for(python).items():
        if name != "torch":  # scripts/env.sh chooses its build
            assert applying[canonicalize_name(name)].specifier == pin.specifier, "run scripts/lock.sh"


def test_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {PROJECT['version']}" in text or "## Unreleased" in text


def test_licence_is_the_declared_one() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_entry_points_can_be_called(entry_point: str) -> None:
    module, _, name = entry_point.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_package_is_found_by_the_build() -> None:
    from setuptools import find_packages

    found = set(find_packages(str(ROOT), include=CONFIG["tool"]["setuptools"]["packages"]["find"]["include"]))
    folders = {path.parent for name in ("fuzzyroe", "llava") for path in (ROOT / name).rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == found


def test_every_yaml_file_of_the_packages_is_shipped() -> None:
    patterns = CONFIG["tool"]["setuptools"]["package-data"]
    for name in ("fuzzyroe", "llava"):
        shipped = {path for pattern in patterns[name] for path in (ROOT / name).glob(pattern)}
        assert set((ROOT / name).rglob("*.yaml")) <= shipped


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_parse_and_stop_at_errors(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines


def test_continuous_integration_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_test_script_explains_itself_and_refuses_unknown_arguments() -> None:
    script = ["bash", str(ROOT / "scripts" / "test.sh")]
    told = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert told.returncode == 0
    assert "--all" in told.stdout
    refused = subprocess.run([*script, "--al"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "unknown argument '--al'" in refused.stderr
