"""The parts that checkpoints of all layouts are written from."""

from __future__ import annotations

import pytest

from layouts import Parts, build_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Random weights, a sentencepiece model, folders with a vision tower and a language model."""
    return build_parts(tmp_path_factory.mktemp("parts"))
