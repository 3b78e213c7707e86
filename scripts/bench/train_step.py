#!/usr/bin/env python
"""Time of a training step: dense, with both branches everywhere (soft), and with skipped layers left out (hard).

    python scripts/bench/train_step.py --json train_step.json --check      about 6 minutes on two cores
    python scripts/bench/train_step.py --quick --check                     under a minute

Starts two CPU ranks under DeepSpeed ZeRO-3, with the trainer and the configuration of the stages. All three models live
in one launch and take their steps in turns; dense is full training, the routed ones are the finetune stage. Plans are
nested and differ between samples and ranks. Ratios are medians over pairs of neighbouring steps; wall time of the
slower rank, as that is what a step takes.

Bars: soft <= 1.15 of dense; hard at 30 % skip <= 0.85 of dense.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, distributed
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules import load_rule_base
from launching import ROOT, launch_environment
from llava.model.builder import load_checkpoint
from llava.model.families import get_image_token_id
from llava.model.llava_llama import attach_routing
from llava.train.arguments import LlavaTrainingArguments
from llava.train.parameters import freeze_all_but
from llava.train.stages import PARTS, STAGES
from llava.train.trainer import LlavaTrainer
from llava.train.zero3 import init_communication, prepare_model
from playground.digits.base_model import build_config
from scripts.bench.bench import Line, conditions, make_parser, report

MODES = ("dense", "soft", "hard")
BARS = {"soft": 1.15, "hard": 0.85}
SKIP_RATE = 0.3
ADAPTER_SHARE = 8
"""Hidden size over adapter width: less than the 4 of LLaVA-1.5-7B with RoE's adapters, which cost 3 % of a layer."""

ALLOCATION = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""As scripts/v1_5/launch.sh has it: glibc otherwise gives large activations back and has their pages cleared again."""


class Shape(NamedTuple):
    """What is timed: layers of a width, samples per rank, positions per sample, steps per mode."""

    layers: int
    width: int
    samples: int
    positions: int
    steps: int


FULL = Shape(layers=12, width=512, samples=4, positions=256, steps=15)
QUICK = Shape(layers=6, width=512, samples=4, positions=256, steps=3)


def main() -> None:
    """Launch the ranks, print, check; or be a rank."""
    parser = make_parser(__doc__, "6 layers and fewer steps")
    parser.add_argument("--rank-of", help="folder of the checkpoint; given to the ranks, which time its training")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else FULL
    if arguments.rank_of:
        return run_rank(shape, arguments.rank_of)
    stated = (
        f"{shape.layers} layers of width {shape.width}, {shape.samples} x {shape.positions} tokens per rank, float32, "
        f"ZeRO-3 on two CPU ranks, one thread each, {shape.steps} steps per mode in turns"
    )
    report(arguments, compare(launch(shape)), conditions(what=stated), lambda lines: {"shape": shape._asdict()})


def launch(shape: Shape) -> dict[str, Any]:
    """Write a random checkpoint, run this file on two ranks and give what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        command += ["--rank-of", folder, *(["--quick"] if shape == QUICK else [])]
        environment = {**os.environ, **launch_environment(), **ALLOCATION}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in finished.stdout.splitlines() if line.startswith('{"skip_rate"')]
    if finished.returncode or not lines:
        sys.exit(f"the ranks failed:\n{finished.stderr[-8000:]}")
    return json.loads(lines[-1])


def write_checkpoint(shape: Shape, folder: str) -> None:
    """A LLaVA checkpoint with random weights, around the tokenizer of the playground's base model."""
    base = ROOT / "playground" / "digits" / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = build_config(tokenizer, shape.width, shape.layers)
    config.text_config.intermediate_size = shape.width * 11 // 4
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = shape.width // 64
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(base).save_pretrained(folder)


def run_rank(shape: Shape, folder: str) -> None:
    """Time all modes; what every rank runs."""
    args = LlavaTrainingArguments(
        output_dir=f"{folder}/output",
        deepspeed=str(ROOT / "scripts" / "zero3.json"),
        use_cpu=True,
        max_steps=len(MODES) * (shape.steps + 1),
        per_device_train_batch_size=shape.samples,
    )
    init_communication()
    rank = distributed.get_rank()
    batch, keep = random_batch(shape, rank), nested_plans(shape, rank)
    trainers = {mode: build_trainer(args, folder, shape, mode, keep) for mode in MODES}
    times: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in ("seconds", "busy")}
    for step in range(shape.steps + 1):
        for mode, (trainer, engine) in trainers.items():
            distributed.barrier()
            started, started_busy = time.perf_counter(), time.process_time()
            trainer.training_step(engine, dict(batch))
            trainer.optimizer.step()
            engine.zero_grad()
            elapsed = torch.tensor([time.perf_counter() - started, time.process_time() - started_busy])
            distributed.all_reduce(elapsed, distributed.ReduceOp.MAX)
            if step:  # the first step allocates
                for name, taken in zip(times, elapsed.tolist(), strict=True):
                    times[name][mode].append(taken)
    skip = 1 - keep.mean()
    distributed.all_reduce(skip)
    if rank == 0:
        print(json.dumps({"skip_rate": float(skip) / 2, **times}), flush=True)


def build_trainer(args: Any, folder: str, shape: Shape, mode: str, keep: Tensor) -> tuple[LlavaTrainer, Any]:
    """The trainer of a stage with its engine, made as ``llava.train.stage`` makes them; routed modes carry adapters."""
    stage, policy = STAGES["dense" if mode == "dense" else "finetune"], None
    model = load_checkpoint(folder).model
    if mode != "dense":
        attach_routing(model, FuzzyRouter(load_rule_base("default"), shape.layers), shape.width // ADAPTER_SHARE)
        policy = force_plans(mode, get_image_token_id(model.config), keep)
    prepare_model(model, mode == "hard", uses_deepspeed=True)
    freeze_all_but(model, stage)
    AcceleratorState._reset_state()  # it otherwise refuses a second trainer with DeepSpeed in one process
    trainer = LlavaTrainer(
        learning_rates=dict.fromkeys(PARTS, 1e-4),
        routing_policy=policy,
        model=model,
        args=args,
        train_dataset=[{}] * 1024,  # steps are taken by hand, on one batch
    )
    trainer.current_gradient_accumulation_steps = 1  # set by the loop that is run by hand here
    return trainer, trainer._prepare_for_training(args.max_steps, trainer.get_train_dataloader(), None)[0]


def force_plans(mode: str, image_token_id: int, keep: Tensor) -> Callable[..., RoutingState]:
    """A policy whose plans are given, (B, L)."""
    return lambda inputs, step=0, num_steps=1: RoutingState.from_batch(inputs, image_token_id, mode).forced(keep)


def random_batch(shape: Shape, rank: int) -> dict[str, Tensor]:
    """Text-only samples of one turn each, the second half of it learned."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(8, 40, (shape.samples, shape.positions), generator=generator)
    labels = ids.clone()
    labels[:, : shape.positions // 2] = -100
    ones = torch.ones_like(ids)
    return {"input_ids": ids, "labels": labels, "turn_ids": ones, "attention_mask": ones}


def nested_plans(shape: Shape, rank: int) -> Tensor:
    """Keep weights (B, L) of 0 and 1: samples skip 0.1, 0.2, 0.4 and 0.5 of the layers, on rank 1 other layers.

    Their mean is ``SKIP_RATE`` where the layers can be divided so.
    """
    rates = [SKIP_RATE + offset for offset in (-0.2, -0.1, 0.1, 0.2)]
    keep = torch.ones(shape.samples, shape.layers)
    skippable = list(range(1, shape.layers))
    order = skippable[::-1] if rank == 0 else skippable[::2] + skippable[1::2]
    for row, rate in enumerate(rates * (shape.samples // len(rates))):
        keep[row, order[: round(rate * shape.layers)]] = 0
    return keep


def compare(measured: dict[str, Any]) -> list[Line]:
    """Ratios to the dense step just before; of processor time besides, which a busy machine hurts less."""
    seconds, busy = measured["seconds"], measured["busy"]
    lines = [Line.of("dense step", seconds["dense"], unit=" s")]
    for mode, what in (("soft", "both branches"), ("hard", f"skip {measured['skip_rate']:.0%}")):
        name = f"{mode} step ({what})"
        lines += [
            Line.ratio(f"{name}: of dense", seconds[mode], seconds["dense"], at_most=BARS[mode]),
            Line.of("  time", seconds[mode], unit=" s"),
            Line.ratio("  of dense, processor time", busy[mode], busy["dense"]),
        ]
    return lines


if __name__ == "__main__":
    main()
