"""Routers: they decide which layers an example skips."""

from __future__ import annotations

from fuzzyroe.routers.base import Router
from fuzzyroe.routers.baselines import KeepAllRouter, LinearScoreRouter, RandomRouter, StaticRouter
from fuzzyroe.routers.fuzzy import FuzzyRouter, PerLayerFuzzyRouter
from fuzzyroe.routers.oracle import OracleRouter
from fuzzyroe.routers.roe.router import LinearRouter

ROUTERS: dict[str, type[Router]] = {
    "fuzzy": FuzzyRouter,
    "fuzzy_per_layer": PerLayerFuzzyRouter,
    "linear_score": LinearScoreRouter,
    "static": StaticRouter,
    "random": RandomRouter,
    "oracle": OracleRouter,
    "none": KeepAllRouter,
    "linear": LinearRouter,
}
"""Routers by name: the only list of them."""


def get_router_class(name: str) -> type[Router]:
    """Look a router up.

    Raises:
        KeyError: If there is none of this name; the message lists the known ones.
    """
    if name not in ROUTERS:
        raise KeyError(f"Router '{name}' is unknown; use one of {', '.join(ROUTERS)}.")
    return ROUTERS[name]


def get_router_name(router: Router) -> str:
    """Give the name under which the class of a router is in ``ROUTERS``.

    Raises:
        KeyError: If it is not there, so that a checkpoint could not be loaded again.
    """
    for name, known in ROUTERS.items():
        if type(router) is known:
            return name
    raise KeyError(f"{type(router).__name__} is none of the routers {', '.join(ROUTERS)}; add it to ROUTERS.")


def plan_router_names() -> tuple[str, ...]:
    """Names of the routers that ``--router`` can attach, the default first."""
    return tuple(name for name, router in ROUTERS.items() if router.is_plan_router)


__all__ = [
    "ROUTERS",
    "FuzzyRouter",
    "KeepAllRouter",
    "LinearRouter",
    "LinearScoreRouter",
    "OracleRouter",
    "PerLayerFuzzyRouter",
    "RandomRouter",
    "Router",
    "StaticRouter",
    "get_router_class",
    "get_router_name",
    "plan_router_names",
]
