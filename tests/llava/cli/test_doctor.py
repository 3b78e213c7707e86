"""Promises of ``fuzzyroe doctor``."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections import namedtuple

import pytest

from llava.cli.doctor import MIN_FREE_DISK, examine

Usage = namedtuple("Usage", "total used free")


def findings(folder) -> dict:
    return {finding.name: finding for finding in examine(folder)}


def test_an_environment_that_runs_the_tests_has_nothing_to_mend(tmp_path):
    failed = [finding for finding in examine(tmp_path) if finding.state == "fail"]
    assert not failed


def test_every_package_of_the_project_is_looked_at(tmp_path):
    assert {"torch", "transformers", "scikit-fuzzy", "deepspeed", "peft", "lmms-eval"} <= set(findings(tmp_path))


def test_only_what_is_not_ok_has_a_remedy(tmp_path):
    for finding in examine(tmp_path):
        assert bool(finding.remedy) == (finding.state != "ok"), finding


def test_a_package_out_of_range_must_be_mended(tmp_path, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.37.2" if name == "transformers" else real(name))
    finding = findings(tmp_path)["transformers"]
    assert finding.state == "fail"
    assert "4.37.2, wanted" in finding.found
    assert finding.remedy.startswith("pip install 'transformers")


@pytest.mark.parametrize(("name", "state"), [("deepspeed", "note"), ("safetensors", "fail")])
def test_only_packages_of_extras_may_be_missing(name, state, tmp_path, monkeypatch):
    real = importlib.metadata.version

    def version(asked: str) -> str:
        if asked == name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return real(asked)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert findings(tmp_path)[name].state == state


def test_a_full_disk_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, MIN_FREE_DISK - 1))
    assert findings(tmp_path)["disk"].state == "note"


def test_offline_mode_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert findings(tmp_path)["hub"].state == "note"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert findings(tmp_path)["hub"].state == "ok"
