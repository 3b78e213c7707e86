#!/usr/bin/env python
"""Time of a training step: dense, with both branches everywhere (soft), and with skipped layers left out (hard).

    python scripts/bench/train_step.py --json train_step.json --check      about 6 minutes on two cores
    python scripts/bench/train_step.py --quick --check                     under a minute

Starts two CPU ranks under DeepSpeed ZeRO-3. All three models live in one launch and take their steps in turns; each is
trained whole. Plans are nested and differ between samples and ranks. Ratios are medians over pairs of neighbouring
steps; wall time of the slower rank, as that is what a step takes.

Bars: soft <= 1.15 of dense; hard at 30 % skip <= 0.85 of dense.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MODES = ("dense", "soft", "hard")
BARS = {"soft": 1.15, "hard": 0.85}
SKIP_RATE = 0.3
ADAPTER_SHARE = 8
"""Hidden size over adapter width: less than the 4 of LLaVA-1.5-7B with RoE's adapters, which cost 3 % of a layer."""


@dataclass(frozen=True)
class Shape:
    """What is timed: layers of a width, samples per rank, positions per sample, steps per mode."""

    layers: int
    width: int
    samples: int
    positions: int
    steps: int


FULL = Shape(layers=12, width=512, samples=4, positions=256, steps=9)
QUICK = Shape(layers=6, width=512, samples=4, positions=256, steps=3)


def parse_arguments() -> argparse.Namespace:
    """Flags of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 layers and fewer steps")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar is not met")
    return parser.parse_args()


def main() -> None:
    """Launch the ranks, print, check."""
    arguments = parse_arguments()
    shape = QUICK if arguments.quick else FULL
    result = launch(shape)
    print(describe(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    missed = [
        f"{mode}: {result['ratio'][mode]:.3f} of dense, bar {bar}"
        for mode, bar in BARS.items()
        if not result["ratio"][mode] <= bar
    ]
    for line in missed:
        print(f"bar not met: {line}", file=sys.stderr)
    if arguments.check and missed:
        sys.exit(1)


def launch(shape: Shape) -> dict:
    """Run this file on two ranks and give what rank 0 found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(port), __file__]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "BENCH_SHAPE": json.dumps(asdict(shape)),
    }
    # DeepSpeed builds an operator on first use and calls ninja, which lies beside Python
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in finished.stdout.splitlines() if line.startswith('{"shape"')]
    if finished.returncode or not lines:
        sys.exit(f"the ranks failed:\n{finished.stderr[-3000:]}")
    return json.loads(lines[-1])


def run_rank(shape: Shape) -> None:
    """Time all modes; what every rank runs."""
    import torch
    from torch import distributed

    from llava.train.engine import import_deepspeed

    import_deepspeed().init_distributed()
    rank = distributed.get_rank()
    engines = {mode: build_engine(shape, mode) for mode in MODES}
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 1000, (shape.samples, shape.positions), generator=generator)
    keep = nested_plans(shape, rank)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for step in range(shape.steps + 1):
        for mode, engine in engines.items():
            distributed.barrier()
            started = time.perf_counter()
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False, **routing(mode, ids, keep)).loss)
            engine.step()
            elapsed = torch.tensor(time.perf_counter() - started)
            distributed.all_reduce(elapsed, distributed.ReduceOp.MAX)
            if step:  # the first step allocates
                seconds[mode].append(float(elapsed))
    skip = 1 - keep.mean()
    distributed.all_reduce(skip)
    if rank == 0:
        print(json.dumps(summarise(shape, seconds, float(skip) / 2)), flush=True)


def build_engine(shape: Shape, mode: str):
    """A ZeRO-3 engine that trains all of a random decoder; routed modes carry adapters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fuzzyroe.attach import attach, find_decoder_layers
    from llava.train.engine import import_deepspeed

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=shape.width,
        intermediate_size=shape.width * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
    )
    model = LlamaForCausalLM(config).train()
    if mode != "dense":
        attach(model, shape.width // ADAPTER_SHARE, "xavier")
    deepspeed = import_deepspeed()
    if mode == "hard":
        deepspeed.utils.set_z3_leaf_modules(model, [type(find_decoder_layers(model)[0])])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100_000}
    settings = {
        "train_micro_batch_size_per_gpu": shape.samples,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def nested_plans(shape: Shape, rank: int):
    """Keep weights (B, L) of 0 and 1: samples skip 0.1, 0.2, 0.4 and 0.5 of the layers, on rank 1 other layers.

    Their mean is ``SKIP_RATE`` where the layers can be divided so.
    """
    import torch

    rates = [SKIP_RATE + offset for offset in (-0.2, -0.1, 0.1, 0.2)]
    keep = torch.ones(shape.samples, shape.layers)
    skippable = list(range(1, shape.layers))
    order = skippable[::-1] if rank == 0 else skippable[::2] + skippable[1::2]
    for row, rate in enumerate(rates * (shape.samples // len(rates))):
        keep[row, order[: round(rate * shape.layers)]] = 0
    return keep


def routing(mode: str, ids, keep) -> dict:
    """The routing keyword of one step."""
    import torch

    from fuzzyroe.routing_state import RoutingState

    return {} if mode == "dense" else {"routing": RoutingState.forced(keep, torch.ones_like(ids), mode)}


def summarise(shape: Shape, seconds: dict[str, list[float]], skip_rate: float) -> dict:
    """Medians and ratios to the dense step taken just before."""
    pairs = {mode: [a / b for a, b in zip(seconds[mode], seconds["dense"], strict=True)] for mode in BARS}
    return {
        "shape": asdict(shape),
        "skip_rate": round(skip_rate, 4),
        "seconds": {mode: statistics.median(values) for mode, values in seconds.items()},
        "ratio": {mode: statistics.median(values) for mode, values in pairs.items()},
        "spread": {mode: [min(values), max(values)] for mode, values in pairs.items()},
    }


def describe(result: dict) -> str:
    """A table of the result with its conditions."""
    shape = result["shape"]
    head = (
        f"{shape['layers']} layers of width {shape['width']}, {shape['samples']} x {shape['positions']} tokens per "
        f"rank, float32, ZeRO-3 on two CPU ranks, one thread each, {shape['steps']} steps per mode in turns"
    )
    rows = [f"dense  {result['seconds']['dense']:7.3f} s"]
    for mode in BARS:
        low, high = result["spread"][mode]
        what = "both branches" if mode == "soft" else f"skip {result['skip_rate']:.0%}"
        rows.append(
            f"{mode:5}  {result['seconds'][mode]:7.3f} s  {result['ratio'][mode]:.3f} of dense "
            f"[{low:.3f}, {high:.3f}], bar {BARS[mode]}  ({what})"
        )
    return "\n".join([head, *rows])


if __name__ == "__main__":
    if "BENCH_SHAPE" in os.environ:
        run_rank(Shape(**json.loads(os.environ["BENCH_SHAPE"])))
    else:
        main()
