"""How much of the ideal speed-up is reached: prefill and decoding at batch 1 and 8, a queue, the published rule.

The ideal of a plan is a dense model with as many layers removed as the plan skips, plus the measured time of as many
adapters; embeddings and head count on both sides. A routed pass, its ideal and the dense model take turns, and a ratio
is that of one turn. On a GPU decoding has no bar: without CUDA graphs it is bound by the launching of kernels.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuzzyroe.routers import LinearRouter
from fuzzyroe.routers.roe.compat import RoECompat
from fuzzyroe.routers.roe.schedule import Relaxation
from fuzzyroe.routers.roe.tokens import RoEPass
from llava.inference.scheduler import form_batches
from scripts.bench.speed.lines import Line
from scripts.bench.speed.passes import Bench, Form, cache_bytes, prompt_state
from scripts.bench.speed.plans import NUM_LEVELS, nested_plans, spread_skips
from scripts.bench.speed.timing import take_turns

BATCH = 8


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        length: Positions of the prompt.
        prefills: Turns of prefills at batch 8; at batch 1 each of the 8 plans has ``alone`` turns.
        alone: See there.
        blocks, steps: Turns of decoding, and tokens of each.
        queue: Requests of the queue.
        slack: By how much the bars are lowered.
    """

    length: int
    prefills: int
    alone: int
    blocks: int
    steps: int
    queue: int
    slack: float


FULL = Effort(length=640, prefills=5, alone=1, blocks=5, steps=4, queue=64, slack=0.0)
QUICK = Effort(length=160, prefills=5, alone=1, blocks=5, steps=4, queue=16, slack=0.05)


def measure_bars(bench: Bench, effort: Effort, skip_rates: Sequence[float]) -> Iterator[Line]:
    """All lines of some skip rates, whose passes take turns too."""
    yield from alone(bench, effort, skip_rates, "prefill")
    yield from alone(bench, effort, skip_rates, "decode")
    yield from prefill_batch(bench, effort, skip_rates)
    yield from decode_batch(bench, effort, skip_rates)
    for rate in skip_rates:
        yield from queue(bench, effort, rate)


def alone(bench: Bench, effort: Effort, skip_rates: Sequence[float], what: str) -> list[Line]:
    """Batch 1, every plan in its turn; a dense pass beside each."""
    is_prefill = what == "prefill"
    adapter = _adapter(bench, 1, effort.length if is_prefill else 1)
    dense, routed, ideal = ({rate: [] for rate in skip_rates} for _ in range(3))
    levels = {rate: spread_skips(bench.shape.layers, rate) for rate in skip_rates}
    for level in range(NUM_LEVELS):
        forms = {"dense": bench.whole()}
        for rate in skip_rates:
            forms[f"routed {rate}"] = bench.planned(nested_plans(bench.shape.layers, levels[rate][level : level + 1]))
            forms[f"ideal {rate}"] = bench.ideal(levels[rate][level])
        turns = effort.alone if is_prefill else 2 * effort.alone
        times = _prefills(bench, forms, 1, effort, turns) if is_prefill else _decodes(bench, forms, 1, effort, turns)
        for rate in skip_rates:
            dense[rate] += times["dense"]
            routed[rate] += times[f"routed {rate}"]
            ideal[rate] += [seconds + levels[rate][level] * adapter for seconds in times[f"ideal {rate}"]]
    bar = 0.93 - effort.slack if is_prefill else _decode_bar(bench, effort, 0.93)
    return [
        line
        for rate in skip_rates
        for line in _against(f"{what}, batch 1", rate, dense[rate], routed[rate], ideal[rate], bar)
    ]


def prefill_batch(bench: Bench, effort: Effort, skip_rates: Sequence[float]) -> list[Line]:
    """Batch 8, a plan of its own for every row."""
    adapter, forms = _adapter(bench, BATCH, effort.length), {"dense": bench.whole()}
    skips = {rate: spread_skips(bench.shape.layers, rate) for rate in skip_rates}
    for rate in skip_rates:
        forms[f"routed {rate}"] = bench.planned(nested_plans(bench.shape.layers, skips[rate]))
        forms[f"ideal {rate}"] = bench.ideal(_mean(skips[rate]))
    times, lines = _prefills(bench, forms, BATCH, effort, effort.prefills), []
    whole = cache_bytes(bench.filled(forms["dense"], BATCH, 64))
    for rate in skip_rates:
        ideal = [seconds + _mean(skips[rate]) * adapter for seconds in times[f"ideal {rate}"]]
        lines += _against(
            f"prefill, batch {BATCH}", rate, times["dense"], times[f"routed {rate}"], ideal, 0.93 - effort.slack
        )
        share = cache_bytes(bench.filled(forms[f"routed {rate}"], BATCH, 64)) / whole
        bar = 0.52 if _mean(skips[rate]) * 2 == bench.shape.layers else None
        lines.append(Line(f"skip {rate:.0%}, KV bytes, batch {BATCH}: of dense", share, at_most=bar))
    return lines


def decode_batch(bench: Bench, effort: Effort, skip_rates: Sequence[float]) -> list[Line]:
    """Batch 8: all rows of one plan, then a plan of its own for every row, as they come."""
    adapter, forms, num_layers = _adapter(bench, BATCH, 1), {"dense": bench.whole()}, bench.shape.layers
    skips = {rate: spread_skips(num_layers, rate) for rate in skip_rates}
    for rate in skip_rates:
        forms[f"equal {rate}"] = bench.planned(nested_plans(num_layers, [_mean(skips[rate])] * BATCH))
        forms[f"mixed {rate}"] = bench.planned(nested_plans(num_layers, skips[rate]))
        forms[f"ideal {rate}"] = bench.ideal(_mean(skips[rate]))
    times, lines = _decodes(bench, forms, BATCH, effort, effort.blocks), []
    for rate in skip_rates:
        ideal = [seconds + _mean(skips[rate]) * adapter for seconds in times[f"ideal {rate}"]]
        for kind, bar in (("equal", _decode_bar(bench, effort, 0.90)), ("mixed", None)):
            what = f"decode, batch {BATCH}, {kind} plans"
            lines += _against(what, rate, times["dense"], times[f"{kind} {rate}"], ideal, bar)
    return lines


def queue(bench: Bench, effort: Effort, skip_rate: float) -> list[Line]:
    """Throughput of a queue whose skips are drawn from the levels: with the scheduler, and in the order of arrival."""
    generator = torch.Generator().manual_seed(0)
    levels = spread_skips(bench.shape.layers, skip_rate)
    skips = torch.tensor(levels)[torch.randint(0, NUM_LEVELS, (effort.queue,), generator=generator)]
    plans = nested_plans(bench.shape.layers, skips.tolist())
    arrival = [list(range(start, start + BATCH)) for start in range(0, effort.queue, BATCH)]
    orders = {"scheduled": form_batches(plans, [effort.length] * effort.queue, BATCH), "as they come": arrival}
    forms: dict[str, Form] = {f"ideal {skip}": bench.ideal(skip) for skip in sorted(set(skips.tolist()))}
    for name, batches in orders.items():
        forms |= {f"{name} {number}": bench.planned(plans[batch]) for number, batch in enumerate(batches)}
    times, adapter = _decodes(bench, forms, BATCH, effort, effort.blocks, steps=2), _adapter(bench, BATCH, 1)
    # a request takes an eighth of a batch of its own kind
    ideal = [
        sum(times[f"ideal {skip}"][turn] + skip * adapter for skip in skips.tolist()) / BATCH
        for turn in range(effort.blocks)
    ]
    lines = []
    for name, batches in orders.items():
        taken = [sum(times[f"{name} {n}"][turn] for n in range(len(batches))) for turn in range(effort.blocks)]
        what = f"skip {skip_rate:.0%}, decode, queue of {effort.queue}, batch {BATCH}, {name}: of ideal throughput"
        ratios = [best / seconds for best, seconds in zip(ideal, taken, strict=True)]
        bar = _decode_bar(bench, effort, 0.80) if name == "scheduled" else None
        lines.append(Line.of(what, ratios, at_least=bar))
    return lines


def published_rule(bench: Bench, effort: Effort, skip_rate: float) -> list[Line]:
    """RoE's rule at batch 8, timed beside ours: a layer is skipped only if every row skips it.

    The linear router runs with ``batch_decides_together`` on logits that say what our plans say.
    """
    skips = spread_skips(bench.shape.layers, skip_rate)
    plans = nested_plans(bench.shape.layers, skips)
    lines = []
    for name, together in (("each row its own (ours)", False), ("skip if all agree (published)", True)):
        compat = RoECompat(batch_decides_together=together)
        bench.set_policy(LinearRouter(bench.shape.layers, bench.shape.width, "pooled", compat).to(bench.dtype))
        keep = _decide(bench, plans, effort.length)
        forms = {"dense": bench.whole(), "routed": bench.planned(keep)}
        prefills = _prefills(bench, forms, BATCH, effort, 1 if effort.length > 320 else 3)
        decodes = _decodes(bench, forms, BATCH, effort, effort.blocks)
        for what, times in (("prefill", prefills), ("decode", decodes)):
            ratios = [mine / other for mine, other in zip(times["routed"], times["dense"], strict=True)]
            text = f"skip {skip_rate:.0%}, {what}, batch {BATCH}, {name}: of dense"
            lines.append(Line.of(text, ratios, note=f"skips {1 - float(keep.float().mean()):.2f} of the layers"))
    return lines


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


def _prefills(bench: Bench, forms: dict[str, Form], batch: int, effort: Effort, repeats: int) -> dict[str, list[float]]:
    calls = {name: lambda form=form: bench.prefill(form, batch, effort.length) for name, form in forms.items()}
    return take_turns(bench.clock, repeats, calls)


def _decodes(
    bench: Bench, forms: dict[str, Form], batch: int, effort: Effort, repeats: int, steps: int | None = None
) -> dict[str, list[float]]:
    """Seconds per step."""
    steps = steps or effort.steps
    caches = {name: bench.filled(form, batch, effort.length) for name, form in forms.items()}
    calls = {
        name: lambda form=form, cache=caches[name]: bench.decode(form, cache, batch, steps)
        for name, form in forms.items()
    }
    take_turns(bench.clock, 1, calls)
    times = take_turns(bench.clock, repeats, calls)
    return {name: [seconds / steps for seconds in values] for name, values in times.items()}


def _adapter(bench: Bench, batch: int, length: int) -> float:
    """Median seconds of one skipped layer."""
    return statistics.median(bench.adapter_seconds(batch, length, 5 if length == 1 else 1) for _ in range(5))


def _decode_bar(bench: Bench, effort: Effort, bar: float) -> float | None:
    return None if bench.clock.is_cuda else bar - effort.slack


def _mean(skips: list[int]) -> int:
    return round(statistics.mean(skips))


def _against(
    what: str, skip_rate: float, dense: list[float], routed: list[float], ideal: list[float], bar: float | None
) -> list[Line]:
    """A routed pass against its ideal and the dense model, turn by turn."""
    what, reached = f"skip {skip_rate:.0%}, {what}", [best / mine for best, mine in zip(ideal, routed, strict=True)]
    return [
        Line.of(f"{what}: ideal over routed", reached, at_least=bar),
        Line.of(f"{what}: routed of dense", [mine / whole for mine, whole in zip(routed, dense, strict=True)]),
        Line.of(f"{what}: ideal of dense", [best / whole for best, whole in zip(ideal, dense, strict=True)]),
        Line.of(f"{what}: dense", [1e3 * seconds for seconds in dense], unit=" ms"),
        Line.of(f"{what}: routed", [1e3 * seconds for seconds in routed], unit=" ms"),
    ]
