"""What a training stage wrote about itself: ``stage.json``, with the rule base beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval.evaluation_file import read_json

RULE_BASE_FILE = "rule_base.yaml"


@dataclass(frozen=True)
class StageSummary:
    """One finished stage; None where the stage has no such number.

    Attributes:
        folder: Its output folder.
        stage: Name of the stage.
        purpose: What it does, in a few words.
        samples: Training samples it could draw from.
        steps: Optimizer steps.
        seconds: Wall-clock time, loading and saving included.
        engine: Class that ran the forward passes.
        zero_stage: ZeRO stage of DeepSpeed; 0 without it.
        world_size: Number of processes.
        calibration: What calibration reported; empty where there was none.
        rule_base: Rule base in the folder.
    """

    folder: Path
    stage: str
    purpose: str = ""
    samples: int | None = None
    steps: int | None = None
    seconds: float | None = None
    engine: str | None = None
    zero_stage: int | None = None
    world_size: int | None = None
    calibration: dict[str, Any] = field(default_factory=dict, repr=False)
    rule_base: Path | None = None


def load_stage(folder: str | Path) -> StageSummary:
    """Read the summary in a stage's output folder.

    Raises:
        ValueError: If it is not JSON or does not name its stage.
        OSError: If there is no ``stage.json``.
    """
    folder = Path(folder)
    content = read_json(folder / "stage.json")
    if "stage" not in content:
        raise ValueError(
            f"{folder / 'stage.json'} does not name its 'stage'; the summary of a finished stage is needed. Pass the "
            "output folder of a stage."
        )
    keys = ("stage", "purpose", "samples", "steps", "seconds", "engine", "zero_stage", "world_size")
    facts = {key: content[key] for key in keys if key in content}
    rule_base = folder / RULE_BASE_FILE
    return StageSummary(
        folder,
        calibration=content.get("calibration") or {},
        rule_base=rule_base if rule_base.is_file() else None,
        **facts,
    )
