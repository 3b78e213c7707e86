"""One tiny LLaVA checkpoint with its data for all training tests."""

from __future__ import annotations

import pytest

from tiny_training import Tiny, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The checkpoint and its data; tests read them and write elsewhere."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))
