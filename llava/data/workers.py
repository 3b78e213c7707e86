"""Data-loader workers that start with everything imported: the preloading of Python's fork server."""

from __future__ import annotations

import multiprocessing

PRELOADED = ("__main__", "llava.data.fork_server")
"""Modules that the server imports: the program itself, which every worker would import first, and what is read with."""


def preload_fork_server() -> None:
    """Have Python's fork server, which starts workers of ``"forkserver"`` loaders, import what workers need.

    The server is a fresh process without data or devices. Workers forked from it share its pages, start in a fraction
    of a second and hold little but what they read. Call before the first of them is started.
    """
    multiprocessing.set_forkserver_preload(list(PRELOADED))
