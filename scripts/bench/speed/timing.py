"""Times of calls that take turns, and the memory that one of them needs."""

from __future__ import annotations

import ctypes
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median of repeated measurements, between their quartiles.

    Attributes:
        median, lower, upper: Of ``count`` values.
        count: How many.
    """

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarise values, at least one."""
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, lower, upper, len(values))


class Clock:
    """Seconds of a call: CPU time of this process, or wall time between synchronisations on a GPU."""

    def __init__(self, device: str) -> None:
        self.is_cuda = torch.device(device).type == "cuda"

    def seconds(self, call: Callable[[], Any]) -> float:
        """Run and time."""
        if not self.is_cuda:
            started = time.process_time()
            call()
            return time.process_time() - started
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - started


def take_turns(clock: Clock, repeats: int, calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each call, ``repeats`` of them, one after the other in every round; even rounds go backwards."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            times[name].append(clock.seconds(calls[name]))
    return times


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Memory that a call needed at most beyond what was in use before; None where the system does not tell.

    On a CPU this is resident memory, whose peak Linux lets a process reset; what the allocator holds back is given to
    the system first.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return max(_resident("VmHWM") - before, 0)


def available_bytes(device: str) -> int:
    """Free memory of the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def cpu_seconds() -> float:
    """CPU time that this process has used, of all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
