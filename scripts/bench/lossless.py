#!/usr/bin/env python
"""Lossless mode of a routed checkpoint: are its tokens those of the dense model, and what do drafts cost and win?

    python scripts/bench/lossless.py --model outputs/quickstart/finetune --json lossless.json --check
    python scripts/bench/lossless.py --model outputs/quickstart/finetune --quick --check

About 5 CPU minutes, or 1 with --quick. Every prompt is answered greedily by the checkpoint with routing off and then
in lossless mode, in turns, at batch 1:
once with answers of exactly ``--tokens`` tokens (no end token before), once as the model answers of itself. Times are
CPU process time (wall time on a GPU) of whole answers, vision tower and prefill included; the ratio is dense over
lossless, the median over prompts with the quartiles. Bar: all answers identical, of at least 200 prompts with at least
32 tokens each (--quick: of those it asks).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from fuzzyroe import set_skip_rate
from llava.conversation import get_template
from llava.inference.generator import Generator
from llava.inference.speculative import LosslessReport, generate_lossless
from llava.model.builder import load_checkpoint
from scripts.bench.speed.prompts import load_prompts
from scripts.bench.speed.report import conditions

Inputs = dict[str, Tensor]

MIN_PROMPTS, MIN_TOKENS = 200, 32


@dataclass(frozen=True)
class Row:
    """One line of the table, over all prompts.

    Attributes:
        answers: Whether the answers are "fixed" in length or as "free" as the model gives them.
        skip_rate: Mean skip rate asked of the drafts.
        draft_skip_rate: Share of layers that the drafts skipped, mean over prompts.
        prompts, identical: Prompts, and those whose lossless answer is the dense one, token for token.
        new_tokens: Tokens per answer, mean.
        acceptance: Accepted share of the drafted tokens.
        tokens_per_verification: Tokens per pass of the full model, the prefill and its token left out.
        speed_ratio, lower, upper: Dense time over lossless time: median and quartiles over prompts.
        smallest_lead: Smallest lead of a chosen token over the runner-up, in logits.
    """

    answers: str
    skip_rate: float
    draft_skip_rate: float
    prompts: int
    identical: int
    new_tokens: float
    acceptance: float
    tokens_per_verification: float
    speed_ratio: float
    lower: float
    upper: float
    smallest_lead: float


def timed(device: torch.device, function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds: process time on a CPU, synchronised wall time on a GPU."""
    is_cuda = device.type == "cuda"
    clock = time.perf_counter if is_cuda else time.process_time
    if is_cuda:
        torch.cuda.synchronize(device)
    started = clock()
    result = function()
    if is_cuda:
        torch.cuda.synchronize(device)
    return result, clock() - started


def compare(
    model: nn.Module, prompts: list[Inputs], answers: str, skip_rate: float, generate: dict, drafting: dict
) -> Row:
    """Answer every prompt twice and put the two beside each other."""
    identical, ratios, reports = 0, [], []
    set_skip_rate(model, None)
    for prompt in prompts:
        dense, dense_seconds = timed(model.device, lambda: model.generate(**prompt, **generate))  # noqa: B023
        (tokens, report), seconds = timed(
            model.device,
            lambda: generate_lossless(model, skip_rate=skip_rate, **drafting, **prompt, **generate),  # noqa: B023
        )
        identical += torch.equal(tokens, dense)
        ratios.append(dense_seconds / seconds)
        reports.append(report)
    return summarise(answers, skip_rate, identical, ratios, reports)


def summarise(
    answers: str, skip_rate: float, identical: int, ratios: list[float], reports: list[LosslessReport]
) -> Row:
    """One line from what each prompt gave."""
    drafted, passes = sum(report.drafted for report in reports), sum(report.verifications for report in reports)
    later_tokens = sum(report.num_new_tokens - 1 for report in reports)
    lower, median, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Row(
        answers=answers,
        skip_rate=skip_rate,
        draft_skip_rate=statistics.mean(1 - float(report.kept_layers.float().mean()) for report in reports),
        prompts=len(reports),
        identical=identical,
        new_tokens=statistics.mean(report.num_new_tokens for report in reports),
        acceptance=sum(report.accepted for report in reports) / max(drafted, 1),
        tokens_per_verification=later_tokens / max(passes, 1),
        speed_ratio=median,
        lower=lower,
        upper=upper,
        smallest_lead=min(report.smallest_lead for report in reports),
    )


@torch.no_grad()
def rounding(model: nn.Module, prompts: list[Inputs], generate: dict, width: int) -> float:
    """Largest difference in a logit between the answer read token by token and ``width`` tokens at once."""
    set_skip_rate(model, None)
    largest = 0.0
    for prompt in prompts:
        tokens = model.generate(**prompt, **generate)
        length = prompt["input_ids"].shape[1]
        logits = []
        for step in (1, width):
            cache = model(**{**prompt, "use_cache": True, "logits_to_keep": 1}).past_key_values
            parts = tokens[:, length:].split(step, dim=1)
            logits.append(torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], dim=1))
        largest = max(largest, float((logits[0] - logits[1]).abs().max()))
    return largest


def print_table(rows: list[Row]) -> None:
    """Print the lines as a table."""
    print(
        "| answers | skip rate asked, drafted | identical | tokens | acceptance | tokens per pass | dense / lossless |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.answers} | {row.skip_rate:.2f}, {row.draft_skip_rate:.2f} | {row.identical} of {row.prompts} "
            f"| {row.new_tokens:.1f} | {row.acceptance:.3f} | {row.tokens_per_verification:.2f} "
            f"| {row.speed_ratio:.2f} ({row.lower:.2f} to {row.upper:.2f}) |"
        )


def main() -> None:
    """Measure, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart/finetune")
    parser.add_argument("--data", type=Path, default=Path("playground/data/digits"))
    parser.add_argument("--template", default="digits")
    parser.add_argument("--skip-rates", type=float, nargs="+", default=[0.25, 0.35, 0.5])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32, help="length of the fixed answers")
    parser.add_argument("--num-draft-tokens", type=int, default=6)
    parser.add_argument("--min-confidence", type=float, default=0.6)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="40 prompts and the largest skip rate only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 where an answer differs")
    arguments = parser.parse_args()
    number, skip_rates = arguments.prompts, arguments.skip_rates
    if arguments.quick:
        number, skip_rates = min(number, 40), [max(skip_rates)]
    torch.set_num_threads(1)
    print(conditions(arguments.device))
    checkpoint = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
    model = checkpoint.model.eval().to(arguments.device)
    generator = Generator(checkpoint, get_template(arguments.template))
    prompts = load_prompts(generator, arguments.data, number)
    length = arguments.tokens
    free = {
        "do_sample": False,
        "use_cache": True,
        "max_new_tokens": length,
        "pad_token_id": generator.padding,
    }
    drafting = {"num_draft_tokens": arguments.num_draft_tokens, "min_confidence": arguments.min_confidence}
    kinds = {"fixed": {**free, "min_new_tokens": length}, "free": free}
    rows = [compare(model, prompts, kind, rate, kinds[kind], drafting) for kind in kinds for rate in skip_rates]
    difference = rounding(model, prompts[:20], kinds["fixed"], arguments.num_draft_tokens + 1)
    print_table(rows)
    print(
        f"smallest lead of a chosen token {min(row.smallest_lead for row in rows):.1e} logits; tokens one by one and "
        f"{arguments.num_draft_tokens + 1} at once differ by at most {difference:.1e}"
    )
    if arguments.json:
        asked = {
            name: value
            for name, value in vars(arguments).items()
            if name not in ("model", "data", "device", "json", "check", "quick")
        }
        result = {
            "conditions": conditions(arguments.device),
            **asked,
            "rounding": difference,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    missed = [
        f"{row.answers} answers, skip rate {row.skip_rate:.2f}: {row.identical} of {row.prompts} identical"
        for row in rows
        if row.identical < row.prompts
    ]
    if not arguments.quick and (len(prompts) < MIN_PROMPTS or length < MIN_TOKENS):
        missed.append(f"{len(prompts)} prompts of {length} tokens; {MIN_PROMPTS} of {MIN_TOKENS} are needed")
    if arguments.check and missed:
        sys.exit("bars not met:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
