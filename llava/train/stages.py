"""Training stages as data.

A stage is one launch: which parts train, how layers are routed meanwhile, whether the router is fitted at its end.
LLaVA runs pretrain, dense; FuzzyRoE runs router, adapter, finetune on the result; RoE runs its own three. Every part
that a stage does not name is frozen before the optimizer exists.

A new stage is one entry of ``STAGES``. Its family, ``Stage.routing``, gives it the flags of that family
(``FAMILIES`` in ``arguments.py``); what those flags need is checked against the parts that it trains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

PARTS = ("vision_tower", "projector", "decoder", "adapter", "router", "lora")
"""Parts of a model; ``router`` is what a router learns by gradients, ``lora`` the LoRA weights of the decoder."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: Value of ``--stage``.
        trains: Parts whose parameters move; empty for a stage of forward passes only.
        routing: The family: "off" (dense), "plan" (layers skipped as the fitted router plans, at random budgets), or
            "relaxed" (RoE's soft decisions, which harden as its schedule goes on).
        calibrates: Whether the router is fitted by forward passes once training has ended.
        purpose: One line for summaries.
        span: Shares of RoE's run between which a relaxed stage lies; None for any other.
    """

    name: str
    trains: tuple[str, ...]
    routing: Literal["off", "plan", "relaxed"]
    calibrates: bool
    purpose: str
    span: tuple[float, float] | None = None

    @property
    def objective(self) -> str:
        """What is minimised unless ``--objective`` says otherwise, a key of ``OBJECTIVES``."""
        return "roe" if self.routing == "relaxed" else "language_model"

    def __str__(self) -> str:
        trains = ", ".join(self.trains) or "nothing"
        return f"{self.name} (trains {trains}; routing {self.routing})"


_ALL = ("projector", "decoder", "adapter")

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("pretrain", ("projector",), "off", False, "LLaVA-1.5's first stage: aligns the projector"),
        Stage("dense", ("projector", "decoder"), "off", False, "LLaVA-1.5 finetuning without routing"),
        Stage("scratch", ("vision_tower", "projector", "decoder"), "off", False, "every weight, without routing"),
        Stage("router", (), "plan", True, "fits the fuzzy router by forward passes, no optimizer"),
        Stage("adapter", ("adapter",), "plan", True, "trains what stands in for a skipped layer"),
        Stage("finetune", _ALL, "plan", True, "trains the routed model as a whole"),
        Stage("roe_adapter", ("adapter",), "relaxed", False, "RoE's first: adapters, under drawn skips", (0.0, 0.3)),
        Stage("roe_router", ("adapter", "router"), "relaxed", False, "RoE's second: linear routers too", (0.3, 0.5)),
        Stage("roe_finetune", (*_ALL, "router"), "relaxed", False, "RoE's third: the whole routed model", (0.5, 1.0)),
    )
}


class StageInputError(ValueError):
    """Input that a stage cannot run on; the message names it and the remedy."""


def get_stage(name: str) -> Stage:
    """Look a stage up; KeyError, which lists the known ones, if there is none of this name."""
    if name not in STAGES:
        raise KeyError(f"Stage '{name}' is unknown; use one of {', '.join(STAGES)}.")
    return STAGES[name]


def choose_stage(
    name: str | None,
    *,
    tune_projector: bool = False,
    freeze_decoder: bool = False,
    freeze_projector: bool = False,
    lora: bool = False,
    freeze_adapters: bool = False,
    refit: bool = True,
    fit_budgets: bool = False,
) -> Stage:
    """Find the stage that flags ask for, changed as LLaVA's flags change what trains.

    Args:
        name: Name in ``STAGES``; None stands for ``pretrain`` with ``tune_projector``, for ``dense`` without.
        tune_projector, freeze_decoder, freeze_projector: LLaVA's ``--tune_mm_mlp_adapter`` (the projector alone
            trains), ``--freeze_backbone`` and ``--freeze_mm_mlp_adapter``.
        lora: LLaVA's ``--lora_enable``: LoRA weights train in place of the decoder.
        freeze_adapters: ``--freeze_adapters``: they stay as they are; new ones start at zero and leave no trace.
        refit: False for ``--refit_router False``: the router stays as it was fitted before.
        fit_budgets: ``--budget_samples``: linear routers are given a table of budgets at the end.

    Raises:
        KeyError: If there is no stage of this name.
        StageInputError: If the flags contradict each other or the stage, or leave nothing to train.
    """
    # LLaVA has no stages; its flag for the first one chooses pretrain
    stage = get_stage(name or ("pretrain" if tune_projector else "dense"))
    trains, own = stage.trains, f"stage {stage.name} trains {', '.join(stage.trains) or 'nothing'}"
    tunes_other, fits_again = tune_projector and trains != ("projector",), stage.calibrates and bool(trains)
    lora_trains, given = "--lora_enable updates the decoder,", f"was given, but stage {stage.name}"
    for is_wrong, message in (
        (tunes_other, f"--tune_mm_mlp_adapter trains the projector alone, {own}; leave one of the two out"),
        (lora and "decoder" not in trains, f"{lora_trains} which stage {stage.name} does not train; leave it out"),
        (lora and freeze_decoder, f"{lora_trains} --freeze_backbone keeps it; leave one of the two out"),
        (freeze_adapters and "adapter" not in trains, f"--freeze_adapters {given} trains no adapters; leave it out"),
        (not refit and not fits_again, f"--refit_router False {given} fits no router again; leave it out"),
        (fit_budgets and "router" not in trains, f"--budget_samples {given} trains no linear routers; leave it out"),
    ):
        if is_wrong:
            raise StageInputError(f"{message}.")
    # LoRA weights take the decoder's place in the list; what a flag freezes leaves it
    freezes = (("decoder", freeze_decoder), ("projector", freeze_projector), ("adapter", freeze_adapters))
    frozen = {part for part, is_set in freezes if is_set}
    trains = tuple("lora" if lora and part == "decoder" else part for part in stage.trains if part not in frozen)
    # a stage of forward passes trains nothing on purpose
    if stage.trains and not trains:
        raise StageInputError(f"The flags freeze all that stage {stage.name} trains; leave one of them out.")
    return replace(stage, trains=trains, calibrates=stage.calibrates and refit or fit_budgets)
