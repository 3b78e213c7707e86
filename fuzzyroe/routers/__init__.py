"""Routers: what decides which layers an example skips."""

from __future__ import annotations

from fuzzyroe.routers.base import Router
from fuzzyroe.routers.fuzzy import FuzzyRouter

ROUTERS: dict[str, type[Router]] = {"fuzzy": FuzzyRouter}
"""Routers by name."""


def get_router_class(name: str) -> type[Router]:
    """Look a router up.

    Raises:
        KeyError: If there is none of this name; the message lists the known ones.
    """
    if name not in ROUTERS:
        raise KeyError(f"Router '{name}' is unknown; use one of {', '.join(ROUTERS)}.")
    return ROUTERS[name]


__all__ = ["ROUTERS", "FuzzyRouter", "Router", "get_router_class"]
