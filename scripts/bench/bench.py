"""What every bench shares: command line, timing in turns, numbers with bars, Markdown tables, JSON, exit status."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass(frozen=True)
class Spread:
    """Median of ``count`` measurements, between their quartiles."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values, at least one."""
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, lower, upper, len(values))

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.lower:.1f} to {self.upper:.1f})"


@dataclass(frozen=True)
class Line:
    """One measured number with its bar; without one it only stands beside others."""

    name: str
    value: float | None  # None if it could not be measured, which meets no bar
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    spread: Spread | None = None  # quartiles of the repetitions, where there were any
    note: str = ""  # why there is no number, or what it stands for

    @classmethod
    def of(cls, name: str, values: Sequence[float], scale: float = 1.0, **options: Any) -> Line:
        """The median of repetitions, with its spread; ``scale`` turns them into the unit."""
        spread = Spread.of([scale * value for value in values])
        return cls(name, spread.median, spread=spread, **options)

    @classmethod
    def ratio(cls, name: str, values: Sequence[float], others: Sequence[float], **options: Any) -> Line:
        """The median of ratios, one for each turn."""
        return cls.of(name, [value / other for value, other in zip(values, others, strict=True)], **options)

    @property
    def has_bar(self) -> bool:
        """Whether there is one."""
        return self.at_least is not None or self.at_most is not None

    @property
    def is_met(self) -> bool:
        """Whether the bar, if any, is met."""
        if self.value is None:
            return not self.has_bar
        is_enough = self.at_least is None or self.value >= self.at_least
        return bool(is_enough and (self.at_most is None or self.value <= self.at_most))

    def to_dict(self) -> dict[str, Any]:
        """As it is written to JSON."""
        value = None if self.value is None else float(self.value)
        return {**asdict(self), "value": value, "met": self.is_met if self.has_bar else None}

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}{self.unit}"
        spread = f" ({self.spread.lower:.3g} to {self.spread.upper:.3g}, n {self.spread.count})" if self.spread else ""
        bar = ""
        if self.has_bar:
            sign, number = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
            bar = f"  bar {sign} {number:g}{self.unit}  {'met' if self.is_met else 'NOT MET'}"
        return f"{self.name:<88} {value:>12}{spread}{bar}{'  ' + self.note if self.note else ''}"


class Clock:
    """Seconds of a call: CPU time of this process, or wall time between synchronisations on a GPU."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.is_cuda = torch.device(device).type == "cuda"

    def read(self) -> float:
        """Seconds since some moment."""
        if not self.is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """Result and seconds of a call."""
        started = self.read()
        return call(), self.read() - started

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of a call."""
        return self.run(call)[1]


def take_turns(
    clock: Clock, repeats: int, calls: dict[Any, Callable[[], Any]], warm_up: bool = False
) -> dict[Any, list[float]]:
    """Seconds of each call, ``repeats`` of them, one after the other in every round; even rounds go backwards.

    With ``warm_up`` a round that is not timed comes first.
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for call in calls.values() if warm_up else ():
        call()
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
    before = psutil.Process().memory_info().rss
    call()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return max(int(peak.split()[1]) * 1024 - before, 0)


def available_bytes(device: str) -> int:
    """Free memory of the device."""
    return torch.cuda.mem_get_info()[0] if torch.device(device).type == "cuda" else psutil.virtual_memory().available


def conditions(device: str = "cpu", what: str = "CPU time of one thread") -> str:
    """Machine and versions, and what is measured."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name()}; {versions}; wall time between synchronisations"
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = named[1] if named else platform.processor() or "unknown CPU"
    return f"{processor}, one of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}; {what}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows, heading -> cell; a row that lacks headings ends in empty cells."""
    heads = [*max(rows, key=len)]
    lines = [heads, ["---"] * len(heads), *([row.get(name, "") for name in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def make_parser(description: str, quick: str) -> argparse.ArgumentParser:
    """The command line of a bench with what all have; ``quick`` says what --quick leaves out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar is not met or was not measured")
    return parser


def report(
    arguments: argparse.Namespace,
    lines: Iterable[Line],
    stated: str = "",
    finish: Callable[[list[Line]], dict[str, Any]] = lambda lines: {},
) -> None:
    """Print conditions and lines as they are measured, write them to JSON, and end with 1 where --check finds a miss.

    Args:
        arguments: Of ``make_parser``.
        lines: The lines, or what measures them one after the other.
        stated: The conditions; those of a CPU if empty.
        finish: Called with all lines; gives more numbers for the file.
    """
    stated = stated or conditions()
    print(stated, flush=True)
    measured = []
    for line in lines:
        print(line, flush=True)
        measured.append(line)
    numbers = finish(measured)
    if arguments.json:
        content = {"conditions": stated, "lines": [line.to_dict() for line in measured], **numbers}
        arguments.json.write_text(json.dumps(content, indent=1, default=vars) + "\n", encoding="utf-8")
    missed = [line for line in measured if not line.is_met]
    if arguments.check and missed:
        sys.exit("bars not met:\n" + "\n".join(map(str, missed)))
