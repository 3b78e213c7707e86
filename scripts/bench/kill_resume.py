#!/usr/bin/env python
"""Kill -9 every kind of stage again and again under DeepSpeed ZeRO-3 and compare it with an undisturbed run.

    python scripts/bench/kill_resume.py --json kill_resume.json --check     eight kills a stage, some 15 minutes
    python scripts/bench/kill_resume.py --quick --check                     three stages, two kills each

Each stage of a tiny LLaVA runs twice on two CPU ranks: once undisturbed, and once killed -9 as soon as half of its
steps are saved, at random moments, and inside saves. After each kill every step checkpoint that has a manifest must be
whole. In the end the killed run must have logged every step once, with the losses of the undisturbed one, and written
the same weights. One launch for all stages: the ranks are forked off a process that has imported everything.

Bars: largest difference of a loss and of a weight <= 1e-6; no faulty checkpoint; a kill that left a step to go on from.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import load_file

from launching import ROOT, launch_environment
from llava.train.arguments import takes
from llava.train.stages import STAGES
from scripts.bench.bench import Line, make_parser, report
from tiny_training import Tiny, make_tiny

ZERO3 = ROOT / "scripts" / "zero3.json"
STEPS = 4
BAR = 1e-6
KINDS = ("half", "save", "time")
"""When a run is killed: half of its steps are saved, a step is being saved, some time has gone by."""


class Case(NamedTuple):
    """A run that is killed: a stage, the case whose output it starts from, and whether it leaves skipped layers out."""

    stage: str
    start: str | None = None
    leaves_out: bool = False


CASES = {
    "pretrain": Case("pretrain"),
    "dense": Case("dense"),
    "scratch": Case("scratch"),
    "router": Case("router"),
    "adapter": Case("adapter", "router"),
    "finetune": Case("finetune", "adapter"),
    "finetune_hard": Case("finetune", "adapter", leaves_out=True),
    "roe_adapter": Case("roe_adapter"),
    "roe_router": Case("roe_router", "roe_adapter"),
    "roe_finetune": Case("roe_finetune", "roe_router"),
}
"""Every kind of stage, each behind what it starts from."""

QUICK = ("dense", "router", "adapter")


def main() -> None:
    """Kill, compare, print, check."""
    parser = make_parser(__doc__, "three stages, two kills each")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments of the kills")
    arguments = parser.parse_args()
    names, kills = (QUICK, 2) if arguments.quick else (tuple(CASES), 8)
    results: dict[str, Any] = {}

    def measure() -> Iterator[Line]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tiny = make_tiny(folder / "tiny")
            (folder / "runs").mkdir()
            plan = build_plan(tiny, folder / "runs", names, kills, arguments.seed)
            run_plan(plan, folder / "runs", lambda line: print(line, flush=True))
            for case in names:
                results[case] = compare(folder / "runs", case)
                yield from judge(case, results[case])

    asked = {"seed": arguments.seed, "kills": kills, "steps": STEPS}
    report(arguments, measure(), finish=lambda lines: {**asked, "cases": results})


def build_plan(tiny: Tiny, folder: Path, names: tuple[str, ...], kills: int, seed: int) -> list[dict[str, Any]]:
    """Cases for tests/support/forked_ranks.py, each with its kinds of kills, drawn so that all kinds come up."""
    plan, generator = [], random.Random(seed)
    for number, name in enumerate(names, start=generator.randrange(len(KINDS))):
        case, stage = CASES[name], STAGES[CASES[name].stage]
        more: dict[str, Any] = {
            "deepspeed": ZERO3,
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": 1,
            "skip_data_check": True,
            "calibration_samples": 16,
            "score_samples": 16,
        }
        more |= {"adapter_hidden_dim": None} if case.start else {}  # it has adapters
        more = {flag: value for flag, value in more.items() if takes(stage, flag)}
        more |= {"train_hard_skip": True} if case.leaves_out else {}
        start = folder / f"{case.start}.whole" if case.start else tiny.base
        # one kill: another kind for each case; several: first at half of the steps, then into saves and between them
        kinds = [KINDS[number % 3]] if kills == 1 else ["half", *(KINDS[1 + kill % 2] for kill in range(kills - 1))]
        if not stage.trains:
            kinds = ["time"] * kills
        flags = without_output(tiny.flags(case.stage, start, folder, **more))
        plan.append({"name": name, "flags": flags, "kinds": kinds, "seed": generator.randrange(2**31)})
    return plan


def without_output(flags: list[str]) -> list[str]:
    """Flags without the output folder, and without those that are None."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if pair[0] != "--output_dir" and pair[1] != "None" for word in pair]


def run_plan(plan: list[dict[str, Any]], folder: Path, say: Any = lambda line: None) -> None:
    """Run the cases of a plan, with a line of progress for each; one that fails otherwise than by its kill raises."""
    (folder / "plan.json").write_text(json.dumps(plan))
    program = [sys.executable, str(ROOT / "tests" / "support" / "forked_ranks.py"), str(folder / "plan.json")]
    with subprocess.Popen(
        program,
        env={**os.environ, **launch_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    ) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("case "):
                say(line.rstrip())
    if process.returncode:
        raise RuntimeError(f"the ranks failed:\n{''.join(lines)[-6000:]}")


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every logging step, in the order of the file."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def compare(folder: Path, name: str) -> dict[str, Any]:
    """What came of a case: its kills, and how far it lies from the undisturbed run in losses and weights."""
    whole, resumed = folder / f"{name}.whole", folder / name
    losses, again = read_losses(whole), read_losses(resumed)
    differences = [0.0]
    for file in sorted(resumed.glob("*.safetensors")):
        ours, theirs = load_file(file), load_file(whole / file.name)
        if ours.keys() != theirs.keys():
            differences.append(float("inf"))
            continue
        differences += [float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours]
    return {
        **json.loads((folder / f"{name}.kills.json").read_text()),
        "steps": [step for step, _ in again],
        "loss_difference": max((abs(a - b) for (_, a), (_, b) in zip(losses, again, strict=False)), default=0.0),
        "weight_difference": max(differences),
        "same_files": sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in resumed.iterdir()),
        "left_over": [p.name for p in folder.glob(f"{name}.*") if p.suffix in (".partial", ".old")],
    }


def judge(name: str, result: dict[str, Any]) -> list[Line]:
    """The bars of a case."""
    kills, trains = result["kills"], STAGES[CASES[name].stage].trains
    steps = list(range(1, STEPS + 1)) if trains else []
    faults = [kill["faults"] for kill in kills if kill["faults"]]
    resumed, torn = (sum(bool(kill[key]) for kill in kills) for key in ("steps", "unfinished"))
    # one kill may come before the first save; of several, one waits for it
    needed = 1 if trains and len(kills) > 1 else None
    whole = f"undisturbed {result['seconds']['whole']:.1f} s"
    return [
        Line(
            f"{name}: kills that left a step to go on from", resumed, needed, note=f"of {len(kills)}, {torn} in saves"
        ),
        Line(f"{name}: largest difference of a loss", result["loss_difference"], at_most=BAR, note=whole),
        Line(f"{name}: largest difference of a weight", result["weight_difference"], at_most=BAR),
        Line(f"{name}: kills that left faulty checkpoints", len(faults), at_most=0, note=str(faults or "")),
        Line(f"{name}: logged other steps", result["steps"] != steps, at_most=0, note=f"logged {result['steps']}"),
        Line(f"{name}: wrote other files", not result["same_files"], at_most=0),
        Line(
            f"{name}: unfinished files left", len(result["left_over"]), at_most=0, note=str(result["left_over"] or "")
        ),
    ]


def find_missed(name: str, result: dict[str, Any]) -> list[Line]:
    """Bars that a case misses."""
    return [line for line in judge(name, result) if not line.is_met]


if __name__ == "__main__":
    main()
