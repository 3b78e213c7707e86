"""RoE (arXiv:2407.14093), the baseline: linear router, routing tokens, schedule, objective and switches, whole."""

from __future__ import annotations

from fuzzyroe.routers.roe.router import LinearRouter
from fuzzyroe.routers.roe.tokens import RoEPass
from fuzzyroe.routers.roe.training import Relaxation

__all__ = ["LinearRouter", "Relaxation", "RoEPass"]
