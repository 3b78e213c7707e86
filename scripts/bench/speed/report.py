"""Table and plot of what was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from scripts.bench.speed.grid import Cell
from scripts.bench.speed.lines import Line
from scripts.bench.speed.timing import Spread

HEADER = (
    "| size | dtype | batch | prompt | skip | prefill dense ms | routed | of dense | of ideal | closed form "
    "| decode dense ms | routed | of dense | of ideal | KV MiB | peak MiB | GFLOP prefill, step |"
)


def conditions(device: str) -> str:
    """Machine and versions."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name()}; {versions}; wall time between synchronisations"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return (
        f"{models[0] if models else platform.processor() or 'unknown CPU'}, one of {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}; {versions}; CPU time of one thread"
    )


def table(cells: list[Cell]) -> str:
    """The grid as Markdown; "of ideal" is ideal over routed, 1 at best."""
    rows = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for cell in cells:
        start = f"| {cell.size} | {cell.dtype} | {cell.batch} | {cell.prompt} | {cell.achieved_skip:.0%} |"
        if cell.not_run:
            rows.append(f"{start} not run: {cell.not_run} |" + " |" * 11)
            continue
        peak = "" if cell.prefill_peak_bytes is None else f"{cell.prefill_peak_bytes / 2**20:.0f}"
        rows.append(
            f"{start} {_times(cell.prefill_dense, cell.prefill_routed, cell.prefill_ideal)} {cell.closed_form:.2f}x |"
            f" {_times(cell.decode_dense, cell.decode_routed, cell.decode_ideal)}"
            f" {cell.kv_bytes / 2**20:.1f} ({cell.kv_share:.2f}) | {peak} "
            f"| {cell.prefill_flops / 1e9:.0f}, {cell.decode_flops / 1e9:.2f} |"
        )
    return "\n".join(rows)


def plot(lines: list[Line], path: Path) -> None:
    """Draw every line that says how much of the ideal is reached, with its quartiles and its bar."""
    from matplotlib.figure import Figure

    chosen = [line for line in lines if line.name.endswith(("ideal over routed", "of ideal throughput"))]
    figure = Figure(figsize=(9, 0.36 * len(chosen) + 1.0), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(reversed(chosen)):
        low, high = line.value - line.spread.lower, line.spread.upper - line.value
        colour = "#4477aa" if line.has_bar else "#bbbbbb"
        axes.barh(place, line.value, height=0.62, color=colour)
        axes.errorbar(line.value, place, xerr=[[low], [high]], color="#222222", capsize=2, linewidth=1)
        if line.at_least is not None:
            axes.plot([line.at_least] * 2, [place - 0.42, place + 0.42], color="#cc3311", linewidth=2)
    axes.set_yticks(range(len(chosen)), [_short(line.name) for line in reversed(chosen)], fontsize=8)
    axes.axvline(1, color="#222222", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.set_xlabel("ideal time over routed time; red: bar, grey: no bar, whiskers: quartiles", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)


def _times(dense: Spread, routed: Spread, ideal: Spread) -> str:
    return (
        f"{dense.median:.1f} ({dense.lower:.1f} to {dense.upper:.1f}) "
        f"| {routed.median:.1f} ({routed.lower:.1f} to {routed.upper:.1f}) "
        f"| {routed.median / dense.median:.3f} | {ideal.median / routed.median:.3f} |"
    )


def _short(name: str) -> str:
    return name.rsplit(":", 1)[0]


def as_json(value: Any) -> Any:
    """Dataclasses of this bench as JSON knows them."""
    return value.to_dict() if isinstance(value, Line) else vars(value)
