"""What the cells of the comparison say together: means over seeds, paired differences, accuracy at equal skip rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.report.comparison import NORMAL_QUANTILE
from playground.compare.answers import Point
from playground.compare.cells import BATCH, MAIN_BUDGET
from playground.compare.packing import unpack

STEP_PASSES = 2
"""Passes that a step with a frozen decoder counts for: forward, and backward without gradients of its weights."""


@dataclass(frozen=True)
class Interval:
    """A mean with the 95 % interval that the choice of questions leaves, all in shares of 1."""

    mean: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Run:
    """One operating point of one cell.

    Attributes:
        point: What it was asked for.
        skip_rate: Achieved share of skipped layers.
        correct: 1 where a question was answered rightly, or a share between two points, (n,).
        agreement: Share of answers that are those of the dense model of the same seed.
        time_ratio: CPU seconds of generation over those of the same checkpoint with routing off.
    """

    point: Point
    skip_rate: float
    correct: np.ndarray
    agreement: float
    time_ratio: float


class Results:
    """All cells that have been run.

    Args:
        cells: What the files hold, by name.
    """

    def __init__(self, cells: dict[str, dict[str, Any]]) -> None:
        self.cells = cells

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read the files of a folder.

        Raises:
            FileNotFoundError: If there is none.
        """
        cells = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        if not cells:
            raise FileNotFoundError(f"{folder} holds no cells; run bash scripts/playground/compare.sh first.")
        return cls(cells)

    def of(self, method: str, target: float | None = None) -> list[dict[str, Any]]:
        """Cells of a method, one for each seed that has been run; of a target if it has one."""
        found = [cell for cell in self.cells.values() if cell["method"] == method and cell["target"] in (None, target)]
        return sorted(found, key=lambda cell: cell["seed"])

    def at_level(self, method: str, level: int) -> list[dict[str, Any]]:
        """Cells of "roe" or "fuzzy" whose router stage had a percentage of RoE's, target 30 %."""
        whole = {"roe": 100, "fuzzy": MAIN_BUDGET}[method]
        return self.of(method if level == whole else f"{method}_{level}", 0.3)

    def run_at(self, cell: dict[str, Any], point: Point) -> Run:
        """One operating point of a cell. Raises KeyError if it was not asked for."""
        for found in cell["evaluations"]:
            if found["point"] == point:
                correct = unpack(found["correct"], cell["questions"]).astype(float)
                return Run(point, found["skip_rate"], correct, found["agreement"], found["time_ratio"])
        raise KeyError(f"{cell['cell']} was not asked for {point}.")

    def runs(self, cell: dict[str, Any], points: Sequence[Point] | None = None) -> list[Run]:
        """Operating points of a cell, all or some, by achieved skip rate."""
        found = [self.run_at(cell, e["point"]) for e in cell["evaluations"] if points is None or e["point"] in points]
        return sorted(found, key=lambda run: run.skip_rate)

    def dense(self, cell: dict[str, Any]) -> np.ndarray:
        """What the dense model of a cell's seed answers rightly, of the cell's questions, (n,)."""
        reference = self.cells[f"dense_{cell['seed']}"]
        correct = self.run_at(reference, None).correct
        if "ids" not in cell:  # asked all of the dense model's questions
            return correct
        chosen = set(cell["ids"])
        return correct[[name in chosen for name in reference["ids"]]]

    def difference(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Interval:
        """Mean difference of pairs, one per seed, (n,) each; questions are the unit, seeds are averaged first."""
        return interval_of(np.mean([first - second for first, second in pairs], axis=0))

    def at_skip_rate(self, cell: dict[str, Any], skip_rate: float, points: Sequence[Point] | None = None) -> Run:
        """A cell at an achieved skip rate, interpolated between its two neighbouring points; at its ends the end."""
        runs = self.runs(cell, points)
        above = next((index for index, run in enumerate(runs) if run.skip_rate >= skip_rate), len(runs) - 1)
        low, high = runs[max(above - 1, 0)], runs[above]
        gap = high.skip_rate - low.skip_rate
        share = 1.0 if gap <= 0 else float(np.clip((skip_rate - low.skip_rate) / gap, 0, 1))

        def between(first: Any, second: Any) -> Any:
            return (1 - share) * first + share * second

        return Run(
            None,
            between(low.skip_rate, high.skip_rate),
            between(low.correct, high.correct),
            between(low.agreement, high.agreement),
            between(low.time_ratio, high.time_ratio),
        )

    def router_cost(self, cell: dict[str, Any], with_budgets: bool = False) -> dict[str, float]:
        """What a cell's router stage cost: optimizer steps, examples, forward passes, CPU seconds.

        Args:
            cell: A cell.
            with_budgets: Count the table of budgets of linear routers too, which the published method has not.
        """
        cost = {"steps": 0.0, "examples": 0.0, "passes": 0.0, "seconds": 0.0}
        for stage in cell["stages"]:
            if stage["stage"] in ("router", "roe_router"):
                cost["steps"] += stage["steps"]
                cost["examples"] += stage["examples"] + stage["fitting_samples"]
                cost["passes"] += stage["examples"] * STEP_PASSES + stage["fitting_passes"]
                cost["seconds"] += stage["cpu_seconds"]
            elif with_budgets:
                cost["examples"] += stage["fitting_samples"]
                cost["passes"] += stage["fitting_passes"]
                cost["seconds"] += stage["fitting_cpu_seconds"]
        return cost

    def total_cost(self, cell: dict[str, Any]) -> dict[str, float]:
        """Examples and CPU seconds of all stages of a cell, those that it shares with another cell included."""
        stages = list(cell["stages"])
        shared, _, last = cell["start"].partition("/")
        if shared in self.cells:
            names = [stage["stage"] for stage in self.cells[shared]["stages"]]
            stages += self.cells[shared]["stages"][: names.index(last) + 1]
        examples = sum(stage["steps"] * BATCH + stage["fitting_samples"] for stage in stages)
        return {"examples": examples, "seconds": sum(stage["cpu_seconds"] for stage in stages)}


def interval_of(values: np.ndarray) -> Interval:
    """Mean of questions, (n,), with the normal 95 % interval of their mean."""
    margin = NORMAL_QUANTILE * float(values.std(ddof=1)) / np.sqrt(len(values))
    mean = float(values.mean())
    return Interval(mean, mean - margin, mean + margin)
