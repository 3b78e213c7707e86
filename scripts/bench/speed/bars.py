"""How much of the ideal speed-up is reached: prefill and decoding at batch 1 and 8, a queue, the published rule.

The ideal of a plan is a dense model with as many layers removed as the plan skips, plus the measured time of as many
adapters; embeddings and head count on both sides. A routed pass, its ideal and the dense model take turns, and a ratio
is that of one turn. On a GPU decoding has no bar: without CUDA graphs it is bound by the launching of kernels.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fuzzyroe.routers import LinearRouter
from fuzzyroe.routers.roe.tokens import RoEPass
from fuzzyroe.routers.roe.training import Relaxation, RoECompat
from llava.inference.scheduler import form_batches
from scripts.bench.bench import Line, take_turns
from scripts.bench.speed.decoders import (
    NUM_LEVELS,
    Bench,
    Form,
    cache_bytes,
    nested_plans,
    prompt_state,
    spread_skips,
)

BATCH = 8


class Effort(NamedTuple):
    """How much is measured."""

    length: int  # positions of the prompt
    prefills: int  # turns of prefills at batch 8
    alone: int  # turns of each of the eight plans at batch 1; of decoding twice as many
    blocks: int  # turns of decoding
    steps: int  # tokens of each
    queue: int  # requests of the queue
    slack: float  # by how much the bars are lowered


FULL = Effort(length=640, prefills=5, alone=1, blocks=5, steps=4, queue=64, slack=0.0)
QUICK = Effort(length=160, prefills=5, alone=1, blocks=5, steps=4, queue=16, slack=0.05)


class Pass(NamedTuple):
    """One kind of pass: what it is called, its batch, and bars by the plans of its rows: their own, or all the mean."""

    name: str
    batch: int
    bars: dict[str, float | None]


PASSES = (
    Pass("prefill", 1, {"": 0.93}),
    Pass("decode", 1, {"": 0.93}),
    Pass("prefill", BATCH, {"": 0.93}),
    Pass("decode", BATCH, {", equal plans": 0.90, ", mixed plans": None}),
)


def measure_bars(bench: Bench, effort: Effort, skip_rates: Sequence[float]) -> Iterator[Line]:
    """All lines of some skip rates, whose passes take turns too."""
    for kind in PASSES:
        yield from measure_pass(bench, effort, skip_rates, kind)
    for rate in skip_rates:
        yield cache_share(bench, rate)
        yield from queue(bench, effort, rate)


def measure_pass(bench: Bench, effort: Effort, skip_rates: Sequence[float], kind: Pass) -> Iterator[Line]:
    """A routed pass against its ideal and the dense model; at batch 1 every plan in its turn."""
    skips = {rate: spread_skips(bench.shape.layers, rate) for rate in skip_rates}
    is_prefill, is_alone = kind.name == "prefill", kind.batch == 1
    adapter = bench.adapter_seconds(kind.batch, effort.length if is_prefill else 1)
    turns = effort.prefills if is_prefill else effort.blocks
    if is_alone:
        turns = effort.alone if is_prefill else 2 * effort.alone
    seconds: defaultdict[tuple[str, float], list[float]] = defaultdict(list)
    for level in range(NUM_LEVELS if is_alone else 1):
        forms: dict[tuple[str, float], Form] = {("dense", 0): bench.whole()}
        removed: Counter[tuple[str, float]] = Counter()
        for rate, levels in skips.items():
            rows = levels[level : level + 1] if is_alone else levels
            mean = removed["ideal", rate] = _mean(rows)
            forms["ideal", rate] = bench.ideal(mean)
            for plans in kind.bars:
                forms[plans, rate] = bench.skipping(*([mean] * len(rows) if plans == ", equal plans" else rows))
        timed = _prefills if is_prefill else _decodes
        for form, values in timed(bench, forms, kind.batch, effort, turns).items():
            seconds[form] += [value + removed[form] * adapter for value in values]
    dense = seconds["dense", 0]
    for rate, plans in itertools.product(skip_rates, kind.bars):
        what = f"skip {rate:.0%}, {kind.name}, batch {kind.batch}{plans}"
        routed, ideal = seconds[plans, rate], seconds["ideal", rate]
        bar = _bar(bench, effort, kind.bars[plans], is_prefill)
        yield Line.ratio(f"{what}: ideal over routed", ideal, routed, at_least=bar)
        yield Line.ratio(f"{what}: routed of dense", routed, dense)
        yield Line.ratio(f"{what}: ideal of dense", ideal, dense)
        yield Line.of(f"{what}: dense", dense, 1e3, unit=" ms")
        yield Line.of(f"{what}: routed", routed, 1e3, unit=" ms")


def cache_share(bench: Bench, skip_rate: float) -> Line:
    """Bytes of keys and values of mixed plans, of those of the dense model."""
    skips = spread_skips(bench.shape.layers, skip_rate)
    routed, dense = (cache_bytes(bench.filled(form, BATCH, 64)) for form in (bench.skipping(*skips), bench.whole()))
    bar = 0.52 if _mean(skips) * 2 == bench.shape.layers else None
    return Line(f"skip {skip_rate:.0%}, KV bytes, batch {BATCH}: of dense", routed / dense, at_most=bar)


def queue(bench: Bench, effort: Effort, skip_rate: float) -> Iterator[Line]:
    """Throughput of a queue whose skips are drawn from the levels: with the scheduler, and in the order of arrival."""
    levels = torch.tensor(spread_skips(bench.shape.layers, skip_rate))
    drawn = torch.randint(0, NUM_LEVELS, (effort.queue,), generator=torch.Generator().manual_seed(0))
    skips = levels[drawn].tolist()
    plans = nested_plans(bench.shape.layers, skips)
    arrival = [list(range(start, start + BATCH)) for start in range(0, effort.queue, BATCH)]
    orders = {"scheduled": form_batches(plans, [effort.length] * effort.queue, BATCH), "as they come": arrival}
    forms: dict[object, Form] = {skip: bench.ideal(skip) for skip in sorted(set(skips))}
    for name, batches in orders.items():
        forms |= {(name, number): bench.planned(plans[batch]) for number, batch in enumerate(batches)}
    times = _decodes(bench, forms, BATCH, effort._replace(steps=2), effort.blocks)
    adapter, turns = bench.adapter_seconds(BATCH, 1), range(effort.blocks)
    # a request takes an eighth of a batch of its own kind
    ideal = [sum(times[skip][turn] + skip * adapter for skip in skips) / BATCH for turn in turns]
    for name, batches in orders.items():
        taken = [sum(times[name, number][turn] for number in range(len(batches))) for turn in turns]
        bar = _bar(bench, effort, 0.80 if name == "scheduled" else None)
        what = f"skip {skip_rate:.0%}, decode, queue of {effort.queue}, batch {BATCH}, {name}: of ideal throughput"
        yield Line.ratio(what, ideal, taken, at_least=bar)


def published_rule(bench: Bench, effort: Effort, skip_rate: float) -> Iterator[Line]:
    """RoE's rule at batch 8, timed beside ours: a layer is skipped only if every row skips it.

    The linear router runs with ``batch_decides_together`` on logits that say what our plans say.
    """
    plans = nested_plans(bench.shape.layers, spread_skips(bench.shape.layers, skip_rate))
    for name, together in (("each row its own (ours)", False), ("skip if all agree (published)", True)):
        compat = RoECompat(batch_decides_together=together)
        bench.set_policy(LinearRouter(bench.shape.layers, bench.shape.width, "pooled", compat).to(bench.dtype))
        keep = _decide(bench, plans, effort.length)
        forms = {"dense": bench.whole(), "routed": bench.planned(keep)}
        prefills = _prefills(bench, forms, BATCH, effort, 1 if effort.length > 320 else 3)
        decodes = _decodes(bench, forms, BATCH, effort, effort.blocks)
        for what, times in (("prefill", prefills), ("decode", decodes)):
            text = f"skip {skip_rate:.0%}, {what}, batch {BATCH}, {name}: of dense"
            note = f"skips {1 - float(keep.float().mean()):.2f} of the layers"
            yield Line.ratio(text, times["routed"], times["dense"], note=note)


def _decide(bench: Bench, plans: Tensor, length: int) -> Tensor:
    """What the linear router makes of plans that are given to it as logits, (B, L) bool."""
    router, state = bench.router.router, prompt_state(len(plans), length, "cpu")
    margin = plans.float() * 2 - 1
    logits = torch.stack([margin, -margin], dim=-1)  # (B, L, 2)
    state.roe = RoEPass(Relaxation(draws=logits.transpose(0, 1).unsqueeze(2)))  # (L, B, 1, 2)
    state.decide, state.num_layers = router.decide, plans.shape[1]
    for layer in range(plans.shape[1]):
        state.decide_layer(layer, torch.empty(len(plans), 1, bench.shape.width))
    return state.kept_layers()


def _prefills(bench: Bench, forms: dict, batch: int, effort: Effort, turns: int) -> dict:
    return take_turns(bench.clock, turns, bench.prefills(forms, batch, effort.length))


def _decodes(bench: Bench, forms: dict, batch: int, effort: Effort, turns: int) -> dict:
    """Seconds per step."""
    calls = bench.decodes(forms, batch, effort.length, effort.steps)
    times = take_turns(bench.clock, turns, calls, warm_up=True)
    return {name: [seconds / effort.steps for seconds in values] for name, values in times.items()}


def _bar(bench: Bench, effort: Effort, bar: float | None, is_prefill: bool = False) -> float | None:
    return None if bar is None or (bench.clock.is_cuda and not is_prefill) else bar - effort.slack


def _mean(skips: Sequence[int]) -> int:
    return round(statistics.mean(skips))
