"""The end of a rank whose launcher is gone: without it, killed launchers leave ranks behind that hold their GPUs."""

from __future__ import annotations

import os
import sys
import threading
import time

POLL_SECONDS = 0.5
ORPHANED = 71
"""Exit code of a process whose launcher is gone."""


def watch_launcher(poll_seconds: float = POLL_SECONDS) -> threading.Thread | None:
    """End this process at once when the launcher that started it is gone.

    A launcher that is killed cannot end its ranks, and a rank may wait for another in a collective for as long as that
    one's time-out. A process started by hand, not as a rank, outlives its shell as any other does and is not watched.

    Args:
        poll_seconds: Time between two looks.

    Returns:
        The watching thread, None where nothing is watched.
    """
    if "LOCAL_RANK" not in os.environ:
        return None
    launcher = os.getppid()
    thread = threading.Thread(target=_watch, args=(launcher, poll_seconds), name="launcher-watch", daemon=True)
    thread.start()
    return thread


def _watch(launcher: int, poll_seconds: float) -> None:
    while os.getppid() == launcher:
        time.sleep(poll_seconds)
    print(f"rank {os.environ.get('RANK', '?')}: the launcher (process {launcher}) is gone; ending.", file=sys.stderr)
    sys.stderr.flush()
    os._exit(ORPHANED)
