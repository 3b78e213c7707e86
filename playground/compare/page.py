"""The results page, written from the cells alone: the same cells give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from playground.compare.answers import TRAINED, Point
from playground.compare.cells import MAIN_BUDGET, ROUTER_BUDGETS, TARGETS
from playground.compare.summary import Interval, Results, Run
from playground.compare.verdicts import bars

LABELS = {
    "roe": "RoE",
    "fuzzy": "FuzzyRoE, shipped antecedents",
    "fuzzy_published": "FuzzyRoE, published antecedents",
    "linear_score": "linear score, 4 parameters",
    "static": "static skip",
    "random": "random skip",
    "oracle": "oracle (a bound)",
}
"""Methods in the order of the tables."""

ABLATIONS = {
    "roe_no_adapter": "RoE without adapters",
    "roe_no_hinge": "RoE without regularisation",
    "roe_pooled": "RoE without routing tokens (pooled states)",
    "roe_front": "RoE, tokens in front of the prompt as published",
    "fuzzy_no_adapter": "FuzzyRoE without adapters",
}

INTRODUCTION = """# Results

FuzzyRoE against RoE and against what is simpler than both, on the digits of the playground: one base model (12 decoder
layers of width 112, 7 MB), {questions:,} held-out questions about images, {seeds} seeds. This page and its figures are
written from `results/cells/*.json` by `bash scripts/playground/compare.sh`, which also runs the cells that are missing.
It is a tiny model and one task: directions, not what a 7B model does.

## What was done alike

Each method trains its adapters (width 32) in 120 steps and then everything in 120 steps, batches of 32, the same
samples for the same seed, AdamW with a cosine from 2e-3 (adapters, linear routers) and then 1e-3 (these) and 3e-4
(backbone). RoE's routers learn in the last 48 of the first 120 steps: 20 % of the run, as published. It is trained for
one skip rate and was trained three times. All others plan ahead, train once at random budgets up to 50 % and serve any
rate; their routers are fitted by forward passes before training, by no more than {budget} % of the passes of RoE's
router stage, and not again. The dense model has the 120 steps of finetuning. RoE runs as it does here by default:
routing tokens behind their segments, none of the published off-by-ones; its published layout is in the last table.

- **accuracy**: exact match; mean of the seeds, lowest and highest in brackets.
- **minus dense**: paired with the dense model of the same seed, points; 95 % interval over questions, seeds averaged
  first. It does not hold the spread of the seeds.
- **agreement**: share of answers that are those of the dense model, right or wrong.
- **skip**: layers left out, as seen on these questions. Targets were set on training data, which has other questions.
- **time**: processor seconds of generation over those of the same checkpoint with routing off, batches of 64 in turns.
"""


READING = """## Reading

- **Which layers are left out matters more than for whom.** Static skip, one order of layers for all questions, trained
  like the others, is as good as any router here. A router's score can only add to it what it knows about single
  questions, and on this base no feature knows much: rank correlations of scores with losses are .2 to .3.
- **The oracle shows what there would be to know**: with the best plan for each question nothing is lost.
- **The published saving of 67 % is there, but it is not the rules' merit.** A fuzzy router fitted by a third of the
  passes, or by a twentieth, is as good as RoE. So is RoE with a third or a twentieth of its router stage: its finetune
  stage goes on training the routers, and on this base a shorter router stage is even better.
- **Orders come from few samples.** 12 of them (19 for static skip) found a poor sixth layer in seed 2, which costs
  all planned methods at 40 % and 50 %. More passes for the order help there, see the table of shares.
- **RoE has one operating point, and it is not always where it was aimed.** Trained softly for 40 %, two of three seeds
  leave out the first layer for every question at inference, and answer nothing. In seed 1 the margin is .007 of a
  logit: its calibrated bias moves it back. The weights that training mixes by hide such a flip.
- **Of RoE's parts only its regularisation is needed here.** Without it nothing is skipped; without adapters, or with
  pooled states for routing tokens, accuracy is no lower, as all weights are finetuned afterwards. Its published layout,
  tokens in front of the prompt, and the default one behind each segment do equally well.
- **Time.** RoE decides layer by layer, in the order of layers, for each row; a plan known before the first layer is
  cheaper to follow in a batch, at the same skip rate."""

AFTERWARDS = """## What was changed after a first look

The first run of the fuzzy cell of seed 0 (commit fd5590d) lost to static skip: 96.0 % right at 25.8 % of the layers
skipped, 95.0 at 36.7, 90.1 at 50.0. Its budgets followed differences between score bins of some ten questions each,
which were chance, so some questions skipped far more layers than others. Since then bins count only as far as their
questions show that they differ (`trust_in_bins` in `fuzzyroe/budget.py`), and a third of the passes that measured
losses order the layers instead. All cells of fitted scores are of the later code. The questions were the same, so
these cells had one look at them more than the others."""


def write_page(results: Results) -> str:
    """Give the page as Markdown, one line break at its end."""
    first = next(iter(results.of("dense")))
    seeds = len(results.of("dense"))
    parts = [INTRODUCTION.format(questions=first["questions"], seeds=seeds, budget=MAIN_BUDGET)]
    parts += ["## Bars\n", *bars(results), ""]
    parts += [
        "## Methods\n",
        "![Accuracy against skipped layers](results/accuracy.svg)\n",
        _dense_line(results),
        BELOW,
        "",
    ]
    for target in TARGETS:
        parts += [f"### Target {100 * target:.0f} %\n", *_methods_table(results, target), ""]
    parts += ["### At RoE's own skip rate\n", EQUAL_RATE, "", *_equal_table(results), ""]
    parts += ["## What training costs\n", COST, "", *_cost_table(results), ""]
    parts += [
        "## How much routing has to be learned\n",
        LEARNED,
        "",
        "![Cost of the router](results/router_cost.svg)\n",
    ]
    parts += [*_level_table(results), ""]
    parts += ["## Parts of the methods left out\n", *_ablation_table(results), "", LEFT_OUT, ""]
    parts += [READING, "", AFTERWARDS]
    return "\n".join(parts).rstrip() + "\n"


BELOW = "What is below 84 % is not in the figure."

EQUAL_RATE = """Each method at the skip rate that RoE as trained reached, seed by seed, between its two nearest
operating points (at its lowest if RoE skipped less). Points of accuracy more than RoE, 95 % interval."""

COST = """Router stage: optimizer steps, training samples touched, passes through the decoder (a step with a frozen
decoder counts as two) and processor seconds of the stage, loading the model included. Total: all stages of one
training; RoE needs one for each skip rate. Means over seeds; two cells ran at a time, one on each core."""

SIZES = "; ".join(f"{level} %: {', '.join(map(str, numbers))}" for level, numbers in ROUTER_BUDGETS.items())

LEARNED = f"""RoE's router stage cut to a share of its 48 steps, and FuzzyRoE's fitted by at most the passes of that
share (samples for order, losses and scores: {SIZES}).
All else is the same. RoE goes on learning to route in its finetune stage. Its calibrated bias is measured on 32 samples
at the end, {14 * 32} passes more."""

LEFT_OUT = """Target 30 %. The last column compares the column before it with the same of the whole method, each at the
rate it reached: RoE's rates cannot be interpolated where they jump."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def points(found: Interval) -> str:
    """A difference in points with its interval."""
    return f"{100 * found.mean:+.1f} [{100 * found.lower:+.1f}, {100 * found.upper:+.1f}]"


def _accuracy(runs: Sequence[Run]) -> str:
    found = [100 * float(run.correct.mean()) for run in runs]
    return f"{np.mean(found):.1f} [{min(found):.1f}, {max(found):.1f}]"


def _percent(values: Iterable[float]) -> str:
    return f"{100 * float(np.mean(list(values))):.1f}"


def _dense_line(results: Results) -> str:
    runs = [results.run_at(cell, None) for cell in results.of("dense")]
    return f"Dense: {_accuracy(runs)} % right."


def _variants(method: str, target: float) -> list[tuple[str, Point]]:
    """Rows of a method in the table of a target: name and what it was asked for."""
    label = LABELS[method]
    if method != "roe":
        return [(label, target)]
    return [(f"{label}, as trained", TRAINED), (f"{label}, calibrated bias", target)]


def _row(results: Results, cells: list[dict[str, Any]], label: str, runs: list[Run]) -> list[str]:
    pairs = [(run.correct, results.dense(cell)) for cell, run in zip(cells, runs, strict=True)]
    return [
        label,
        _accuracy(runs),
        points(results.difference(pairs)),
        _percent(run.agreement for run in runs),
        _percent(run.skip_rate for run in runs),
        f"{np.mean([run.time_ratio for run in runs]):.2f}",
    ]


def _methods_table(results: Results, target: float) -> list[str]:
    rows = []
    for method in LABELS:
        cells = results.of(method, target)
        for label, point in _variants(method, target):
            if cells:
                rows.append(_row(results, cells, label, [results.run_at(cell, point) for cell in cells]))
    return table(["", "accuracy, %", "minus dense", "agreement, %", "skip, %", "time"], rows)


def _equal_table(results: Results) -> list[str]:
    head, rows = [""], {method: [LABELS[method]] for method in LABELS if method not in ("roe", "oracle")}
    for target in TARGETS:
        references = {cell["seed"]: results.run_at(cell, TRAINED) for cell in results.of("roe", target)}
        if not references:
            continue
        head.append(f"at {_percent(run.skip_rate for run in references.values())} %")
        for method, row in rows.items():
            pairs = []
            for cell in results.of(method):
                if cell["seed"] in references:
                    reference = references[cell["seed"]]
                    pairs.append((results.at_skip_rate(cell, reference.skip_rate).correct, reference.correct))
            row.append(points(results.difference(pairs)) if pairs else "")
    return table(head, rows.values())


def _cost_table(results: Results) -> list[str]:
    rows = []
    for method, label in LABELS.items():
        cells = results.of(method, 0.3)
        if not cells or method == "oracle":
            continue
        router, total = ([cost(cell) for cell in cells] for cost in (results.router_cost, results.total_cost))

        def mean(costs: list[dict[str, float]], name: str) -> str:
            return f"{np.mean([cost[name] for cost in costs]):,.0f}"

        rows.append(
            [label, *(mean(router, name) for name in ("steps", "examples", "passes", "seconds"))]
            + [mean(total, "examples"), mean(total, "seconds"), "3" if method == "roe" else "1"]
        )
    totals = [results.total_cost(cell) for cell in results.of("dense")]
    rows.append(["dense", "", "", "", "", *(f"{np.mean([t[n] for t in totals]):,.0f}" for n in totals[0]), "1"])
    head = ["", "router steps", "samples", "passes", "seconds", "total samples", "total seconds", "trainings"]
    return table(head, rows)


def _level_table(results: Results) -> list[str]:
    rows = []
    for level in ROUTER_BUDGETS:
        roe, fuzzy = results.at_level("roe", level), results.at_level("fuzzy", level)
        fuzzy = [cell for cell in fuzzy if cell["seed"] in {other["seed"] for other in roe}]
        if not roe or not fuzzy:
            continue
        trained, calibrated = ([results.run_at(cell, point) for cell in roe] for point in (TRAINED, 0.3))
        equal = [
            (results.at_skip_rate(mine, theirs.skip_rate).correct, theirs.correct)
            for mine, theirs in zip(fuzzy, calibrated, strict=True)
        ]
        mine = [results.run_at(cell, 0.3) for cell in fuzzy]
        cost = [np.mean([results.router_cost(cell)[name] for cell in cells]) for name in ("passes", "seconds")
                for cells in (roe, fuzzy)]  # fmt: skip
        rows.append(
            [f"{level} %", f"{cost[0]:,.0f}; {cost[2]:.0f} s", _at(trained), _at(calibrated)]
            + [f"{cost[1]:,.0f}; {cost[3]:.0f} s", _at(mine), points(results.difference(equal))]
        )
    head = ["share", "RoE: passes; time", "as trained", "calibrated bias", "FuzzyRoE: passes; time", "at 30 %"]
    return table([*head, "minus RoE, calibrated, at its skip rate"], rows)


def _at(runs: Sequence[Run]) -> str:
    return f"{_percent(float(run.correct.mean()) for run in runs)} % at {_percent(run.skip_rate for run in runs)} %"


def _ablation_table(results: Results) -> list[str]:
    rows = []
    for method, label in {"roe": "RoE", **ABLATIONS}.items():
        whole = {cell["seed"]: cell for cell in results.of(method.split("_")[0], 0.3)}
        cells = [cell for cell in results.of(method, 0.3) if cell["seed"] in whole]
        if not cells:
            continue
        is_linear = method.startswith("roe")
        own = [results.run_at(cell, TRAINED if is_linear else 0.3) for cell in cells]
        calibrated = [results.run_at(cell, 0.3) for cell in cells]
        pairs = [
            (run.correct, results.run_at(whole[cell["seed"]], 0.3).correct)
            for cell, run in zip(cells, calibrated, strict=True)
        ]
        against = "" if method == "roe" else points(results.difference(pairs))
        rows.append([label, _at(own) if is_linear else "", _at(calibrated), against])
    return table(["", "as trained", "calibrated bias, or planned for 30 %", "minus the whole method"], rows)
