"""The arms of the comparison as data: what each method trains, from what, with which flags, and what it is asked.

A new arm is one line of ``ARMS``. Every method trains its adapters in 120 steps and everything in 120 steps, with
batches of 32, the same learning rates and the same parts of the data. RoE's linear routers learn in the last 48 of the
first 120 steps, its published share of 20 % of the run. A router that is fitted gets forward passes instead, no more
than a share of what those 48 steps cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SEEDS = (0, 1, 2)
TARGETS = (0.2, 0.3, 0.4)
MAIN_TARGET = 0.3
PLANNED = (0.2, 0.3, 0.4, 0.5)
"""Rates that a router with budgets is asked for; the last shows where its curve goes on."""

TRAINED = "trained"
"""The operating point that linear routers were trained for."""

Point = float | str | None
"""What a model is asked for: a mean skip rate, ``TRAINED``, or None for routing off."""

BATCH = 32
MAX_LENGTH = 512
MAX_SKIP_RATIO = 0.5
ADAPTER_STEPS, ROUTER_STEPS, FINETUNE_STEPS = 72, 48, 120
ADAPTER_RATES = ("--roe_lr", "2e-3")
BACKBONE_RATE = "3e-4"
FINETUNE_RATES = ("--roe_lr", "1e-3", "--backbone_lr", BACKBONE_RATE)
WIDTH = ("--adapter_hidden_dim", "32")
NO_ADAPTERS = ("--freeze_adapters", "True")
"""New adapters start at zero then, so a skipped layer is left out and nothing stands in for it."""

SHARES = {5: (1, 8, 39, 2), 10: (3, 12, 58, 5), 33: (12, 32, 146, 16), 100: (32, 112, 544, ROUTER_STEPS)}
"""Percent of RoE's router stage -> samples for the order of layers, for losses and for scores; and RoE's steps.

48 steps of 32 samples are 3,072 passes, counting a step with a frozen decoder as two: forward, and backward without
gradients of its weights. Fitting takes 51 passes for each order sample, 8 for each loss sample, 1 for each score
sample.
"""

MAIN_SHARE = 33
"""Percent that the published claim speaks of: 67 % saved."""


@dataclass(frozen=True)
class Training:
    """One stage of an arm."""

    stage: str  # name in ``STAGES``
    flags: tuple[str, ...] = ()  # besides those that all stages share
    steps: int = 0  # optimizer steps; 0 for a stage of forward passes
    data: str = ""  # part of the data that it reads: router, adapter or finetune


@dataclass(frozen=True)
class Arm:
    """What is compared; it is trained once for each seed and target."""

    method: str  # its name in the files of its cells
    label: str  # its row in the tables
    stages: tuple[Training, ...]  # what is trained, in this order
    points: tuple[Point, ...] = PLANNED  # what it is asked for; other targets than the main one: only that
    targets: tuple[float | None, ...] = (None,)  # rates that it is trained for; (None,) if one training serves all
    table: str = "methods"  # where the results page shows it: methods, cost or ablation
    start: str = ""  # folder below the output that it starts from, ``{}`` is the seed; empty for the base model
    policy: str = "own"  # or what takes the place of the trained router in the evaluation: "oracle"
    file: str = ""  # its cells' files, if they are not named after the method
    part_of: str = ""  # method that an ablation is compared with
    style: tuple[str, str] = ("#1f2933", ".")  # colour and mark in the figures

    @property
    def has_trained_point(self) -> bool:
        """Whether it has an operating point of its own; its rates jump, so none is interpolated between them."""
        return TRAINED in self.points


@dataclass(frozen=True)
class Cell:
    """One training run of an arm with the questions that it is asked; one file of results."""

    arm: Arm
    seed: int
    target: float | None = None

    @property
    def name(self) -> str:
        """Name of its file."""
        target = f"_{100 * self.target:.0f}" if self.target and len(self.arm.targets) > 1 else ""
        return f"{self.arm.file or self.arm.method}{target}_{self.seed}"

    @property
    def start(self) -> str:
        """Folder that it starts from, see ``Arm``."""
        return self.arm.start.format(self.seed)

    @property
    def points(self) -> tuple[Point, ...]:
        """What it is asked for."""
        own = (TRAINED, self.target) if self.arm.has_trained_point else (self.target,)
        return self.arm.points if self.target in (None, MAIN_TARGET) else own

    @property
    def wave(self) -> int:
        """Cells of one wave need only cells of earlier ones: the dense answers, or a stage to start from."""
        return 0 if self.arm.method == "dense" else 2 if self.start else 1


def sizes(share: int) -> tuple[str, ...]:
    """Flags that fit a scored router by no more passes than a percentage of RoE's router stage."""
    order, losses, scores, _ = SHARES[share]
    return ("--order_samples", str(order), "--calibration_samples", str(losses), "--score_samples", str(scores))


def planned(*router_flags: str, has_adapters: bool = True) -> tuple[Training, ...]:
    """Stages of a router that plans ahead and is fitted once, before anything is trained."""
    keep = ("--refit_router", "False")
    router = Training("router", (*WIDTH, *router_flags), data="router")
    if not has_adapters:
        bare = (*keep, *NO_ADAPTERS, "--backbone_lr", BACKBONE_RATE)
        return router, Training("finetune", bare, FINETUNE_STEPS, "finetune")
    adapter = Training("adapter", (*keep, *ADAPTER_RATES), ADAPTER_STEPS + ROUTER_STEPS, "adapter")
    return router, adapter, Training("finetune", (*keep, *FINETUNE_RATES), FINETUNE_STEPS, "finetune")


def roe(
    *flags: str, attach: tuple[str, ...] = (), steps: int = ROUTER_STEPS, has_adapters: bool = True
) -> tuple[Training, ...]:
    """RoE's three stages, the second as long as asked for; a table of budgets is measured at the end."""
    attach, last = (*WIDTH, *attach), ("--budget_samples", "32", *FINETUNE_RATES, *flags)
    finetune = Training("roe_finetune", last, FINETUNE_STEPS, "finetune")
    if not has_adapters:
        router = Training("roe_router", (*attach, *ADAPTER_RATES, *flags, *NO_ADAPTERS), steps, "router")
        return router, replace(finetune, flags=(*last, *NO_ADAPTERS))
    adapter = Training("roe_adapter", (*attach, *ADAPTER_RATES, *flags), ADAPTER_STEPS, "adapter")
    return adapter, Training("roe_router", (*ADAPTER_RATES, *flags), steps, "router"), finetune


MAIN = sizes(MAIN_SHARE)
DENSE = (Training("dense", ("--learning_rate", BACKBONE_RATE), FINETUNE_STEPS, "finetune"),)
STATIC, RANDOM = ("--order_samples", "19", "--router", "static"), ("--router", "random")
PUBLISHED_RULES, LINEAR_SCORE = ("--rule_base", "published"), ("--router", "linear_score")
POOLED, IN_FRONT = ("--routing_summary", "pooled"), ("--roe_compat", "front")

# RoE's arms are trained for 30 % unless they say otherwise; some go on from the adapters of the whole method
ROE = {"points": (TRAINED, *TARGETS), "targets": (MAIN_TARGET,)}
ON_ADAPTERS = {"start": "roe_30_{}/roe_adapter", **ROE}
ROE_PART = {"table": "ablation", "part_of": "roe"}
ORACLE = {"start": "fuzzy_{}/finetune", "policy": "oracle"}

ARMS = (
    Arm("dense", "dense", DENSE, (None,)),
    Arm("roe", "RoE", roe(), ROE["points"], TARGETS, style=("#c2571a", "s")),
    Arm("fuzzy", "FuzzyRoE, shipped antecedents", planned(*MAIN), style=("#1f6fb2", "o")),
    Arm("fuzzy_published", "FuzzyRoE, published antecedents", planned(*MAIN, *PUBLISHED_RULES), style=("#7fb3de", "o")),
    Arm("linear_score", "linear score, 4 parameters", planned(*MAIN, *LINEAR_SCORE), style=("#4b8f5a", "^")),
    Arm("static", "static skip", planned(*STATIC), style=("#8a6bb8", "v")),
    Arm("random", "random skip", planned(*RANDOM), style=("#8c959f", "x")),
    Arm("oracle", "oracle (a bound)", (), TARGETS, **ORACLE, style=("#1f2933", "*")),
    *(
        Arm(f"fuzzy_{share}", f"FuzzyRoE, {share} %", planned(*sizes(share)), table="cost", file=f"fuzzy_cost{share}")
        for share in SHARES
        if share != MAIN_SHARE
    ),
    *(
        Arm(f"roe_{n}", f"RoE, {n} %", roe(steps=steps)[1:], table="cost", file=f"roe_cost{n}", **ON_ADAPTERS)
        for n, (*_, steps) in SHARES.items()
        if n != 100
    ),
    Arm("roe_no_adapter", "RoE without adapters", roe(has_adapters=False), **ROE_PART, **ROE),
    # the hinge has no gradient while skips are drawn
    Arm("roe_no_hinge", "RoE without regularisation", roe("--skip_loss_weight", "0.0")[1:], **ROE_PART, **ON_ADAPTERS),
    Arm("roe_pooled", "RoE without routing tokens (pooled states)", roe(attach=POOLED), **ROE_PART, **ROE),
    Arm("roe_front", "RoE, tokens in front of the prompt as published", roe(attach=IN_FRONT), **ROE_PART, **ROE),
    Arm(
        "fuzzy_no_adapter",
        "FuzzyRoE without adapters",
        planned(*MAIN, has_adapters=False),
        table="ablation",
        part_of="fuzzy",
    ),
)
"""All arms, in the order of the tables."""


def arms_of(table: str) -> tuple[Arm, ...]:
    """Arms of one table."""
    return tuple(arm for arm in ARMS if arm.table == table)


def at_share(method: str, share: int) -> str:
    """Method whose router stage had a percentage of RoE's: the arm "roe" or "fuzzy" itself, or one cut to a share."""
    return method if share == {"roe": 100, "fuzzy": MAIN_SHARE}[method] else f"{method}_{share}"


def cells() -> tuple[Cell, ...]:
    """All cells, those that others need first."""
    found = [Cell(arm, seed, target) for seed in SEEDS for arm in ARMS for target in arm.targets]
    return tuple(sorted(found, key=lambda cell: (cell.wave, ("methods", "cost", "ablation").index(cell.arm.table))))
