"""Skip targets of single tasks: the budgets that training draws for samples of a named source.

A source with target t draws uniformly from the widest interval within [0, max_skip_ratio] that is centred on t, so the
mean of its budgets is t; other sources draw from all of [0, max_skip_ratio].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llava.data.records import RecordFile
from llava.train.stages import Stage, StageInputError


def parse_task_targets(text: str, max_skip_ratio: float) -> dict[str, float]:
    """Read the value of ``--task_skip_ratios``.

    Args:
        text: ``SOURCE=RATIO`` pairs separated by commas, such as ``ocr_vqa=0.2,gqa=0.4``.
        max_skip_ratio: Largest target, in (0, 1).

    Returns:
        Target of each source, in [0, ``max_skip_ratio``].

    Raises:
        ValueError: If a pair cannot be read, a source stands there twice, or a target is out of range.
    """
    targets: dict[str, float] = {}
    for pair in text.split(","):
        source, _, ratio = pair.strip().rpartition("=")
        try:
            target = float(ratio)
        except ValueError:
            source = ""
        if not source:
            raise ValueError(
                f"--task_skip_ratios has {pair!r}; SOURCE=RATIO pairs separated by commas are allowed, such as "
                "ocr_vqa=0.2,gqa=0.4. Correct it."
            )
        if source in targets:
            raise ValueError(f"--task_skip_ratios names {source} twice; give one target per source.")
        if not 0 <= target <= max_skip_ratio:
            raise ValueError(
                f"--task_skip_ratios {source}={ratio} lies outside [0, --max_skip_ratio {max_skip_ratio}]; lower it, "
                "or raise --max_skip_ratio."
            )
        targets[source] = target
    return targets


def check_task_targets(
    stage: Stage, targets: dict[str, float], data_path: str | Path, skip_pattern: str, objective: str
) -> None:
    """Refuse targets that no budget would follow.

    Args:
        stage: The stage.
        targets: Target of each source.
        data_path: Records, read until every source was seen.
        skip_pattern: Value of ``--skip_pattern``.
        objective: Value of ``--adapter_objective``.

    Raises:
        StageInputError: If the stage draws no budgets, or a source has no record.
    """
    if stage.routing != "plan" or not stage.trains or skip_pattern != "plan" or objective != "answers":
        raise StageInputError(
            "--task_skip_ratios was given, but only the stages adapter and finetune draw budgets, along plans of the "
            f"router; this is stage {stage.name} with --skip_pattern {skip_pattern} and --adapter_objective "
            f"{objective}. Leave it out."
        )
    seen: set[str] = set()
    for record in RecordFile(data_path):
        seen.add(record.source)
        if seen.issuperset(targets):
            return
    unknown = [source for source in targets if source not in seen]
    raise StageInputError(
        f"--task_skip_ratios names {', '.join(unknown)}, but the sources of {data_path} are {', '.join(sorted(seen))}; "
        "name one of these (the first folder of an image, text without one)."
    )


class TaskTargets:
    """The interval that each sample of a batch draws its budget from.

    Args:
        targets: Target of each source that has one, in [0, ``max_skip_ratio``].
        max_skip_ratio: Largest budget.
        source_of: Gives the source of a sample by its index.
    """

    def __init__(self, targets: dict[str, float], max_skip_ratio: float, source_of: Callable[[int], str]) -> None:
        self.max_skip_ratio = max_skip_ratio
        self.source_of = source_of
        self.intervals = {source: centred_interval(target, max_skip_ratio) for source, target in targets.items()}

    def intervals_of(self, sample_index: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest budget of samples, by their indices (B,); (B,) each, on the CPU."""
        anywhere = (0.0, self.max_skip_ratio)
        rows = [self.intervals.get(self.source_of(index), anywhere) for index in sample_index.tolist()]
        return torch.tensor(rows).unbind(dim=1)


def centred_interval(target: float, highest: float) -> tuple[float, float]:
    """The widest interval within [0, ``highest``] whose middle is ``target``."""
    reach = min(target, highest - target)
    return target - reach, target + reach
