"""The cells of the comparison as one table of runs, and what runs of different arms say about each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llava.report.comparison import NORMAL_QUANTILE
from playground.compare.arms import BATCH, MAIN_TARGET, TRAINED, Point

Cells = dict[str, dict[str, Any]]
"""What the files of the cells hold, by name."""

RATE = "skip_rate"
"""Key of an evaluation that arms are compared at."""

STEP_PASSES = 2
"""Passes that a step with a frozen decoder counts for: forward, and backward without gradients of its weights."""


class Interval(NamedTuple):
    """A mean with the 95 % interval that the choice of questions leaves, all in shares of 1."""

    mean: float
    lower: float
    upper: float

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.upper, -self.lower)

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} [{100 * self.lower:+.1f}, {100 * self.upper:+.1f}]"


def pack(bits: Sequence[int]) -> str:
    """Right and wrong answers as hexadecimal digits, the first bit first; the last byte is filled up with zeros."""
    return np.packbits(np.array(bits, dtype=np.uint8)).tobytes().hex()


def unpack(digits: str, count: int) -> np.ndarray:
    """The bits of ``pack``, (count,) of 0 and 1."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))[:count]


def read_cells(folder: Path) -> Cells:
    """Read the files of a folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    cells = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not cells:
        raise FileNotFoundError(f"{folder} holds no cells; run bash scripts/playground/compare.sh first.")
    return cells


def reading_mark(cells: Cells) -> str:
    """Give the first line of a reading of these cells: other cells have another."""
    content = json.dumps(cells, sort_keys=True)
    return f"<!-- read from cells {hashlib.sha256(content.encode()).hexdigest()[:16]} -->"


def make_runs(cells: Cells) -> pd.DataFrame:
    """One row for each operating point of each cell.

    Returns:
        Columns ``cell``, ``method``, ``seed``, ``target`` (NaN if one training serves all), ``point`` (see ``Point``;
        "dense" for None), ``rate`` (observed), ``correct`` and ``dense`` (1 where the cell, or the dense model of its
        seed, answers a question rightly, (n,) each), ``agreement`` (with the dense answers), ``time`` (over the same
        checkpoint with routing off), and those of ``router_cost`` and ``total_cost``.
    """
    dense = {cell["seed"]: cell for cell in cells.values() if cell["method"] == "dense"}
    rows = []
    for name, cell in cells.items():
        reference = dense[cell["seed"]]
        whole = unpack(reference["evaluations"][0]["correct"], reference["questions"]).astype(float)
        if "ids" in cell:  # asked some of the dense model's questions
            asked = set(cell["ids"])
            whole = whole[[question in asked for question in reference["ids"]]]
        known = {"cell": name, "method": cell["method"], "seed": cell["seed"], "target": cell["target"], "dense": whole}
        known |= {**router_cost(cell), **total_cost(cells, cell)}
        for evaluation in cell["evaluations"]:
            measured = {
                "point": "dense" if evaluation["point"] is None else evaluation["point"],
                "rate": evaluation[RATE],
                "correct": unpack(evaluation["correct"], cell["questions"]).astype(float),
                "agreement": evaluation["agreement"],
                "time": evaluation["time_ratio"],
            }
            rows.append({**known, **measured})
    return pd.DataFrame(rows).astype({"target": float, "point": object})


def router_cost(cell: dict[str, Any]) -> dict[str, float]:
    """What the router stage of a cell cost: optimizer steps, samples, forward passes, CPU seconds."""
    stages = [stage for stage in cell["stages"] if stage["stage"] in ("router", "roe_router")]
    return {
        "router_steps": sum(stage["steps"] for stage in stages),
        "router_samples": sum(stage["examples"] + stage["fitting_samples"] for stage in stages),
        "router_passes": sum(stage["examples"] * STEP_PASSES + stage["fitting_passes"] for stage in stages),
        "router_seconds": sum(stage["cpu_seconds"] for stage in stages),
    }


def total_cost(cells: Cells, cell: dict[str, Any]) -> dict[str, float]:
    """Samples and CPU seconds of all stages of a cell, those that it shares with another cell included."""
    stages = list(cell["stages"])
    shared, _, last = cell["start"].partition("/")
    if shared in cells:
        names = [stage["stage"] for stage in cells[shared]["stages"]]
        stages += cells[shared]["stages"][: names.index(last) + 1]
    samples = sum(stage["steps"] * BATCH + stage["fitting_samples"] for stage in stages)
    return {"total_samples": samples, "total_seconds": sum(stage["cpu_seconds"] for stage in stages)}


def of(runs: pd.DataFrame, method: str, target: float | None = MAIN_TARGET) -> pd.DataFrame:
    """Runs of a method; of one trained for each target, those of one target."""
    return runs[(runs.method == method) & (runs.target.isna() | (runs.target == target))]


def pick(runs: pd.DataFrame, method: str, point: Point, target: float | None = MAIN_TARGET) -> pd.DataFrame:
    """Runs of a method at what it was asked for, one for each seed, which is the index."""
    found = of(runs, method, target)
    return found[found.point == point].set_index("seed").sort_index()


def at_rates(runs: pd.DataFrame, method: str, rates: pd.Series, target: float | None = MAIN_TARGET) -> pd.DataFrame:
    """A method at observed skip rates: each seed interpolated, question by question, between its two nearest points.

    Beyond its lowest and highest rate these are taken. Gives ``rate``, ``correct`` and ``dense`` for each seed that has
    a rate and was run.
    """
    rows = {}
    for seed, own in of(runs, method, target).groupby("seed"):
        if seed not in rates.index:
            continue
        own = own.sort_values("rate", kind="stable")
        above = min(int(own.rate.searchsorted(rates[seed])), len(own) - 1)
        low, high = own.iloc[max(above - 1, 0)], own.iloc[above]
        gap = high.rate - low.rate
        share = 1.0 if gap <= 0 else float(np.clip((rates[seed] - low.rate) / gap, 0, 1))
        rows[seed] = [(1 - share) * low[name] + share * high[name] for name in ("rate", "correct")] + [low.dense]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["rate", "correct", "dense"])


def difference(first: pd.Series, second: pd.Series) -> Interval | None:
    """Mean difference of two columns of answers, seed by seed; questions are the unit, seeds are averaged first.

    None where no seed has both.
    """
    pairs = (first - second).dropna()
    return interval_of(np.mean([*pairs], axis=0)) if len(pairs) else None


def interval_of(values: np.ndarray) -> Interval:
    """Mean of questions, (n,), with the normal 95 % interval of their mean."""
    margin = NORMAL_QUANTILE * float(values.std(ddof=1)) / np.sqrt(len(values))
    mean = float(values.mean())
    return Interval(mean, mean - margin, mean + margin)


def compare(runs: pd.DataFrame, method: str, other: str, point: Point) -> Interval | None:
    """How much more often one method is right than another at equal skip rates, those with one training per target
    at the main one.

    ``other`` may be "dense"; ``point`` is the rate of both. If the rates of one jump, it is what that one is asked for:
    the other is taken at the rate that came of it.
    """
    jump = [TRAINED in set(of(runs, name).point) for name in (method, other)]
    if jump == [True, False] and other != "dense":
        reverse = compare(runs, other, method, point)
        return None if reverse is None else -reverse
    if jump[1]:
        theirs = pick(runs, other, point)
        return difference(at_rates(runs, method, theirs.rate).correct, theirs.correct)
    rates = pd.Series(point, index=runs.seed.unique())
    mine = at_rates(runs, method, rates)
    return difference(mine.correct, mine.dense if other == "dense" else at_rates(runs, other, rates).correct)
