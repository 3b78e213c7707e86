"""What each training stage does, as data.

A stage is one launch: which parts train, how layers are routed meanwhile, whether the router is calibrated at its
end. FuzzyRoE runs router, adapter, finetune; every part not named is frozen before the optimizer exists.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("vision_tower", "projector", "decoder", "adapter")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: Value of ``--stage``.
        trains: Parts whose parameters move; empty for a stage of forward passes only.
        routing: "off" (dense), or "plan" (layers skipped as the calibrated router plans, at random budgets).
        calibrates: Whether the router is fitted by forward passes once training has ended.
        purpose: One line for summaries.
    """

    name: str
    trains: tuple[str, ...]
    routing: str
    calibrates: bool
    purpose: str


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("dense", ("projector", "decoder"), "off", False, "LLaVA-1.5 finetuning without routing"),
        Stage("scratch", ("vision_tower", "projector", "decoder"), "off", False, "every weight, without routing"),
        Stage("router", (), "plan", True, "fits the fuzzy router by forward passes, no optimizer"),
        Stage("adapter", ("adapter",), "plan", True, "trains what stands in for a skipped layer"),
        Stage("finetune", ("projector", "decoder", "adapter"), "plan", True, "trains the routed model as a whole"),
    )
}


def get_stage(name: str) -> Stage:
    """Look a stage up.

    Raises:
        KeyError: If there is none of this name; the message lists the known ones.
    """
    if name not in STAGES:
        raise KeyError(f"Stage '{name}' is unknown; use one of {', '.join(STAGES)}.")
    return STAGES[name]
