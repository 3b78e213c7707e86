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

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from fuzzyroe import set_skip_rate
from llava.conversation import get_template
from llava.inference.generator import Generator
from llava.inference.speculative import generate_lossless
from llava.model.builder import load_checkpoint
from scripts.bench.bench import Clock, Line, conditions, make_parser, markdown, report
from scripts.bench.speed.checkpoint import Inputs, load_prompts

MIN_PROMPTS, MIN_TOKENS = 200, 32


def compare(model: nn.Module, prompts: list[Inputs], skip_rate: float, generate: dict, drafting: dict) -> dict:
    """Answer every prompt twice: how many answers are ``identical``, ``reports`` of drafts, ``ratios`` of times."""
    identical, ratios, reports, clock = 0, [], [], Clock(model.device)
    set_skip_rate(model, None)
    for prompt in prompts:
        asked = {**prompt, **generate}
        dense, dense_seconds = clock.run(lambda: model.generate(**asked))  # noqa: B023
        answer, seconds = clock.run(lambda: generate_lossless(model, skip_rate=skip_rate, **drafting, **asked))  # noqa: B023
        identical += torch.equal(answer[0], dense)
        ratios.append(dense_seconds / seconds)
        reports.append(answer[1])
    return {"identical": identical, "reports": reports, "ratios": ratios}


def summarise(answers: str, skip_rate: float, found: dict) -> tuple[dict[str, Any], list[Line]]:
    """A row of the table, and its lines, from what each prompt gave."""
    reports, what = found["reports"], f"{answers} answers, skip rate {skip_rate:.2f}"
    drafted, passes = sum(report.drafted for report in reports), sum(report.verifications for report in reports)
    # the prefill and its token are no verification
    later_tokens = sum(report.num_new_tokens - 1 for report in reports)
    observed = statistics.mean(1 - float(report.kept_layers.float().mean()) for report in reports)
    acceptance = sum(report.accepted for report in reports) / max(drafted, 1)
    speed = Line.of(f"{what}: dense over lossless time", found["ratios"], unit="x")
    lines = [
        Line(f"{what}: identical of {len(reports)}", found["identical"], at_least=len(reports)),
        speed,
        Line(f"{what}: smallest lead of a token", min(report.smallest_lead for report in reports), unit=" logits"),
    ]
    return {
        "answers": answers,
        "skip rate: target, observed": f"{skip_rate:.2f}, {observed:.2f}",
        "identical": f"{found['identical']} of {len(reports)}",
        "tokens": f"{statistics.mean(report.num_new_tokens for report in reports):.1f}",
        "acceptance": f"{acceptance:.3f}",
        "tokens per full pass": f"{later_tokens / max(passes, 1):.2f}",
        "dense / lossless time": f"{speed.value:.2f} ({speed.spread.lower:.2f} to {speed.spread.upper:.2f})",
    }, lines


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


def main() -> None:
    """Measure, print, check."""
    parser = make_parser(__doc__, "40 prompts and the largest skip rate only")
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
    arguments = parser.parse_args()
    number, length = min(arguments.prompts, 40 if arguments.quick else arguments.prompts), arguments.tokens
    skip_rates = [max(arguments.skip_rates)] if arguments.quick else arguments.skip_rates
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def measure() -> Iterator[Line]:
        checkpoint = load_checkpoint(arguments.model, dtype=getattr(torch, arguments.dtype))
        model = checkpoint.model.eval().to(arguments.device)
        generator = Generator(checkpoint, get_template(arguments.template))
        prompts = load_prompts(generator, arguments.data, number)
        free = {"do_sample": False, "use_cache": True, "max_new_tokens": length, "pad_token_id": generator.padding}
        drafting = {"num_draft_tokens": arguments.num_draft_tokens, "min_confidence": arguments.min_confidence}
        kinds = {"fixed": {**free, "min_new_tokens": length}, "free": free}
        for answers, generate in kinds.items():
            for rate in skip_rates:
                row, lines = summarise(answers, rate, compare(model, prompts, rate, generate, drafting))
                rows.append(row)
                yield from lines
        width = arguments.num_draft_tokens + 1
        difference = rounding(model, prompts[:20], kinds["fixed"], width)
        yield Line(f"tokens one by one and {width} at once, largest difference", difference, unit=" logits")
        if not arguments.quick:
            yield Line("prompts", len(prompts), at_least=MIN_PROMPTS)
            yield Line("tokens of a fixed answer", length, at_least=MIN_TOKENS)

    def finish(lines: list[Line]) -> dict[str, Any]:
        print(markdown(rows))
        own = ("model", "data", "device", "json", "check", "quick")
        return {"rows": rows, **{name: value for name, value in vars(arguments).items() if name not in own}}

    report(arguments, measure(), conditions(arguments.device), finish)


if __name__ == "__main__":
    main()
