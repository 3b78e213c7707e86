"""The cells of the comparison, as data: what each method trains, from what, with which flags, and what it is asked.

Every method trains its adapters in 120 steps and everything in 120 steps, with batches of 32, the same learning rates
and the same parts of the data. RoE's linear routers learn in the last 48 of the first 120 steps, its published share
of 20 % of the run. A router that is fitted gets forward passes instead, no more than a share of what those 48 steps
cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SEEDS = (0, 1, 2)
TARGETS = (0.2, 0.3, 0.4)
PLANNED = (0.2, 0.3, 0.4, 0.5)
"""Rates that a router with budgets is asked for; the last shows where its curve goes on."""

BATCH = 32
MAX_LENGTH = 512
MAX_SKIP_RATIO = 0.5
ADAPTER_STEPS, ROUTER_STEPS, FINETUNE_STEPS = 72, 48, 120
ADAPTER_RATE, FINETUNE_ADAPTER_RATE, BACKBONE_RATE = "2e-3", "1e-3", "3e-4"

FINETUNE_RATES = ("--roe_lr", FINETUNE_ADAPTER_RATE, "--backbone_lr", BACKBONE_RATE)
NO_ADAPTERS = ("--freeze_adapters", "True")
"""New adapters start at zero then, so a skipped layer is left out and nothing stands in for it."""

ROUTER_BUDGETS = {5: (1, 8, 39), 10: (3, 12, 58), 33: (12, 32, 146), 100: (32, 112, 544)}
"""Percent of RoE's router stage -> samples for the order of layers, for losses and for scores.

48 steps of 32 samples are 3,072 passes, counting a step with a frozen decoder as two: forward, and backward without
gradients of its weights. Fitting takes 51 passes for each order sample, 8 for each loss
sample, 1 for each score sample.
"""

ROE_STEPS = {5: 2, 10: 5, 33: 16, 100: ROUTER_STEPS}
"""Percent of RoE's router stage -> its steps."""

MAIN_BUDGET = 33
"""Percent that the published claim speaks of: 67 % saved."""


@dataclass(frozen=True)
class Training:
    """One stage of a cell.

    Attributes:
        stage: Name in ``STAGES``.
        flags: Flags besides those that all stages share.
        steps: Optimizer steps; 0 for a stage of forward passes.
        data: Which part of the data it reads: router, adapter or finetune.
    """

    stage: str
    flags: tuple[str, ...] = ()
    steps: int = 0
    data: str = ""


@dataclass(frozen=True)
class Cell:
    """One training run with the questions that it is asked.

    Attributes:
        name: Name of its file.
        method: What is compared.
        seed: Seed of the run.
        stages: What is trained, in this order.
        points: Skip rates that it is asked for: a rate, "trained" for the operating point of linear routers, or None
            for the dense model.
        target: Rate that it is trained for; None if one training serves all.
        start: Folder below the output that the first stage, or the evaluation, starts from; empty for the base model.
        policy: "own", or what takes the place of the trained router in the evaluation: "oracle".
        table: Where the results page shows it: methods, cost or ablation.
    """

    name: str
    method: str
    seed: int
    stages: tuple[Training, ...]
    points: tuple[float | str | None, ...]
    target: float | None = None
    start: str = ""
    policy: str = "own"
    table: str = "methods"

    @property
    def wave(self) -> int:
        """Cells of one wave need only cells of earlier ones: the dense answers, or a stage to start from."""
        return 0 if self.method == "dense" else 2 if self.start else 1


def sizes(budget: int) -> tuple[str, ...]:
    """Flags that fit a scored router by no more passes than a percentage of RoE's router stage."""
    order, losses, scores = ROUTER_BUDGETS[budget]
    return ("--order_samples", str(order), "--calibration_samples", str(losses), "--score_samples", str(scores))


def planned_stages(router_flags: tuple[str, ...], has_adapters: bool = True) -> tuple[Training, ...]:
    """Stages of a router that plans ahead and is fitted once, before anything is trained."""
    keep = ("--refit_router", "False")
    router = Training("router", ("--adapter_hidden_dim", "32", *router_flags), data="router")
    adapter = Training("adapter", (*keep, "--roe_lr", ADAPTER_RATE), ADAPTER_STEPS + ROUTER_STEPS, "adapter")
    if has_adapters:
        return router, adapter, Training("finetune", (*keep, *FINETUNE_RATES), FINETUNE_STEPS, "finetune")
    bare = (*keep, *NO_ADAPTERS, "--backbone_lr", BACKBONE_RATE)
    return router, Training("finetune", bare, FINETUNE_STEPS, "finetune")


def roe_stages(
    flags: tuple[str, ...] = (),
    attach_flags: tuple[str, ...] = (),
    steps: int = ROUTER_STEPS,
    has_adapters: bool = True,
) -> tuple[Training, ...]:
    """RoE's three stages, the second as long as asked for; a table of budgets is measured at the end."""
    rates, attach = ("--roe_lr", ADAPTER_RATE), ("--adapter_hidden_dim", "32", *attach_flags)
    last = ("--budget_samples", "32", *FINETUNE_RATES, *flags)
    finetune = Training("roe_finetune", last, FINETUNE_STEPS, "finetune")
    if has_adapters:
        adapter = Training("roe_adapter", (*attach, *rates, *flags), ADAPTER_STEPS, "adapter")
        return adapter, Training("roe_router", (*rates, *flags), steps, "router"), finetune
    return (
        Training("roe_router", (*attach, *rates, *flags, *NO_ADAPTERS), steps, "router"),
        replace(finetune, flags=(*last, *NO_ADAPTERS)),
    )


PLANNERS: dict[str, tuple[str, ...]] = {
    "fuzzy": sizes(MAIN_BUDGET),
    "fuzzy_published": (*sizes(MAIN_BUDGET), "--rule_base", "published"),
    "linear_score": (*sizes(MAIN_BUDGET), "--router", "linear_score"),
    "static": ("--order_samples", "19", "--router", "static"),
    "random": ("--router", "random"),
}
"""Method -> flags with which its router is attached."""

ROE_ABLATIONS: dict[str, tuple[Training, ...]] = {
    "roe_no_adapter": roe_stages(has_adapters=False),
    "roe_no_hinge": roe_stages(("--skip_loss_weight", "0.0"))[1:],
    "roe_pooled": roe_stages(attach_flags=("--routing_summary", "pooled")),
    "roe_front": roe_stages(attach_flags=("--roe_compat", "front")),
}
"""RoE without its adapters, without its regularisation, without routing tokens; and with tokens in front. The hinge
has no gradient while skips are drawn, so the second goes on from the adapters of the whole method."""

ROE_POINTS = ("trained", *TARGETS)


def cells() -> tuple[Cell, ...]:
    """All cells, those that others need first."""
    found = []
    for seed in SEEDS:
        learning = ("--learning_rate", BACKBONE_RATE)
        dense = (Training("dense", learning, FINETUNE_STEPS, "finetune"),)
        found.append(Cell(f"dense_{seed}", "dense", seed, dense, (None,)))
        for method, flags in PLANNERS.items():
            found.append(Cell(f"{method}_{seed}", method, seed, planned_stages(flags), PLANNED))
        for target in TARGETS:
            name = f"roe_{round(100 * target)}_{seed}"
            points = ROE_POINTS if target == 0.3 else ("trained", target)
            found.append(Cell(name, "roe", seed, roe_stages(), points, target))
        start = f"fuzzy_{seed}/finetune"
        found.append(Cell(f"oracle_{seed}", "oracle", seed, (), TARGETS, start=start, policy="oracle"))
        for budget in ROUTER_BUDGETS:
            if budget != MAIN_BUDGET:
                stages = planned_stages(sizes(budget))
                found.append(Cell(f"fuzzy_cost{budget}_{seed}", f"fuzzy_{budget}", seed, stages, PLANNED, table="cost"))
            if budget != 100:
                stages, start = roe_stages(steps=ROE_STEPS[budget])[1:], f"roe_30_{seed}/roe_adapter"
                name = f"roe_cost{budget}_{seed}"
                found.append(Cell(name, f"roe_{budget}", seed, stages, ROE_POINTS, 0.3, start, table="cost"))
        for method, stages in ROE_ABLATIONS.items():
            start = f"roe_30_{seed}/roe_adapter" if method == "roe_no_hinge" else ""
            found.append(Cell(f"{method}_{seed}", method, seed, stages, ROE_POINTS, 0.3, start, table="ablation"))
        bare = planned_stages(PLANNERS["fuzzy"], has_adapters=False)
        found.append(Cell(f"fuzzy_no_adapter_{seed}", "fuzzy_no_adapter", seed, bare, PLANNED, table="ablation"))
    tables = ("methods", "cost", "ablation")
    return tuple(sorted(found, key=lambda cell: (cell.wave, tables.index(cell.table))))
