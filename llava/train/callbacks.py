"""What is written while a stage trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = {
    "loss": "loss",
    "grad_norm": "gradient",
    "learning_rate": "rate",
    "routing/skip_rate": "skipped",
    "throughput/samples_per_second": "samples/s",
}
"""Logged values that are printed, with the words they are printed by."""


class MetricsFile(TrainerCallback):
    """Append every logged value to ``metrics.jsonl``, one JSON object per logging step.

    A resumed run first removes what was logged after its checkpoint, so that every step stands there once.

    Args:
        path: File to append to, written by rank 0 alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines of the steps that are not taken again."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= state.global_step]
        unfinished = self.path.with_name(f".{self.path.name}.tmp")
        unfinished.write_text("".join(line + "\n" for line in kept))
        unfinished.replace(self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Console(TrainerCallback):
    """Print the numbers that one follows a run by, one line per logging step; ``metrics.jsonl`` has them all."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print one line."""
        if not state.is_world_process_zero or not logs:
            return
        shown = {name: logs[name] for name in SHOWN if name in logs}
        if "loss" in shown:
            numbers = ", ".join(f"{SHOWN[name]} {value:.4g}" for name, value in shown.items())
            print(f"step {state.global_step} of {state.max_steps}: {numbers}", flush=True)


def _step_of(line: str) -> float:
    """Step of a logged line; beyond all steps if a kill cut the line short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
