"""Scripts as modules, so that tests can call their functions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Import a file below ``scripts/`` by its path."""

    def load(path: str) -> ModuleType:
        name = "script_" + path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load
