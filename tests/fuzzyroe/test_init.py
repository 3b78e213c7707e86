"""Promises of what is imported from ``fuzzyroe`` itself."""

from __future__ import annotations

import pytest

import fuzzyroe
from fuzzyroe.attach import attach
from fuzzyroe.routers import ROUTERS


def test_the_public_face_is_what_the_modules_have() -> None:
    assert fuzzyroe.attach is attach and fuzzyroe.ROUTERS is ROUTERS
    assert all(hasattr(fuzzyroe, name) for name in fuzzyroe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        fuzzyroe.atach  # noqa: B018
