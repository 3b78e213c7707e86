"""A table over sizes, data types, batches, prompts and skip rates: times against dense and ideal, memory, counts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fuzzyroe.flops import decode_flops, prefill_flops
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from scripts.bench.speed.passes import Bench, cache_bytes
from scripts.bench.speed.plans import nested_plans, spread_skips
from scripts.bench.speed.shapes import SHAPES, Shape
from scripts.bench.speed.timing import Spread, available_bytes, peak_bytes, take_turns

STEPS = 4


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        sizes: Names in ``SHAPES``.
        dtypes: Names of torch's data types.
        batches, prompts, skip_rates: Values of each.
        device: "cpu" or a CUDA device.
        repeats: Turns.
        max_seconds: A cell that is expected to take longer is named and left out.
    """

    sizes: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    skip_rates: tuple[float, ...]
    device: str
    repeats: int
    max_seconds: float


@dataclass(frozen=True)
class Cell:
    """One line of the table; times in milliseconds, of a whole batch.

    Attributes:
        size, dtype, batch, prompt, skip_rate: Which.
        achieved_skip: Skipped share of layers, over all rows.
        prefill_dense, prefill_routed, prefill_ideal: Prefill.
        decode_dense, decode_routed, decode_ideal: One decoding step.
        prefill_peak_bytes: Memory of a routed prefill beyond the weights, cache included; None where unknown.
        kv_bytes, kv_share: Keys and values of the batch, and their share of the dense model's.
        prefill_flops, decode_flops: By ``fuzzyroe.flops``.
        closed_form: Speed-up of the prefill by those counts.
        not_run: Why there are no numbers; None where there are.
    """

    size: str
    dtype: str
    batch: int
    prompt: int
    skip_rate: float
    achieved_skip: float = 0.0
    prefill_dense: Spread | None = None
    prefill_routed: Spread | None = None
    prefill_ideal: Spread | None = None
    decode_dense: Spread | None = None
    decode_routed: Spread | None = None
    decode_ideal: Spread | None = None
    prefill_peak_bytes: int | None = None
    kv_bytes: int = 0
    kv_share: float = 1.0
    prefill_flops: int = 0
    decode_flops: int = 0
    closed_form: float = 1.0
    not_run: str | None = None


def measure_grid(grid: Grid) -> Iterator[Cell]:
    """Measure cell after cell; one decoder is held at a time."""
    for size, dtype in itertools.product(grid.sizes, grid.dtypes):
        shape, reason = SHAPES[size], _does_not_fit(SHAPES[size], dtype, grid.device)
        bench = None if reason else _build(shape, dtype, grid.device)
        speed = None if bench is None else _operations_per_second(bench)
        for batch, prompt, rate in itertools.product(grid.batches, grid.prompts, grid.skip_rates):
            plans = nested_plans(shape.layers, spread_skips(shape.layers, rate, batch))
            base = Cell(size, dtype, batch, prompt, rate, **_counts(shape, plans, prompt))
            why = reason or _takes_too_long(base, shape, grid, speed)
            yield Cell(**{**vars(base), "not_run": why}) if why else _measure(bench, base, plans, grid)
        del bench


def _measure(bench: Bench, cell: Cell, plans: torch.Tensor, grid: Grid) -> Cell:
    batch, length = cell.batch, cell.prompt
    skip = round(statistics.mean((~plans).sum(dim=1).tolist()))
    forms = {"dense": bench.whole(), "routed": bench.planned(plans), "ideal": bench.ideal(skip)}
    bench.prefill(forms["routed"], batch, length)
    calls = {name: lambda form=form: bench.prefill(form, batch, length) for name, form in forms.items()}
    prefill = take_turns(bench.clock, grid.repeats, calls)
    caches = {name: bench.filled(form, batch, length) for name, form in forms.items()}
    calls = {name: lambda n=name: bench.decode(forms[n], caches[n], batch, STEPS) for name in forms}
    take_turns(bench.clock, 1, calls)
    decode = take_turns(bench.clock, grid.repeats, calls)
    stored = {name: cache_bytes(cache) for name, cache in caches.items()}
    caches.clear()
    adapter = [statistics.median(bench.adapter_seconds(batch, n) for _ in range(3)) for n in (length, 1)]
    return Cell(
        **{
            **vars(cell),
            **_spreads("prefill", prefill, skip * adapter[0], 1),
            **_spreads("decode", decode, skip * adapter[1] * STEPS, STEPS),
            "prefill_peak_bytes": peak_bytes(lambda: bench.prefill(forms["routed"], batch, length), grid.device),
            "kv_bytes": stored["routed"],
            "kv_share": stored["routed"] / stored["dense"],
        }
    )


def _spreads(what: str, times: dict[str, list[float]], adapters: float, steps: int) -> dict[str, Spread]:
    ideal = [seconds + adapters for seconds in times["ideal"]]
    named = {"dense": times["dense"], "routed": times["routed"], "ideal": ideal}
    return {f"{what}_{name}": Spread.of([1e3 * s / steps for s in values]) for name, values in named.items()}


def _counts(shape: Shape, plans: torch.Tensor, prompt: int) -> dict[str, float]:
    dense = torch.ones_like(plans)
    routed = prefill_flops(shape.sizes, plans, prompt)
    return {
        "achieved_skip": 1 - float(plans.float().mean()),
        "prefill_flops": routed,
        "decode_flops": decode_flops(shape.sizes, plans, prompt + 1),
        "closed_form": prefill_flops(shape.sizes, dense, prompt) / routed,
    }


def _build(shape: Shape, dtype: str, device: str) -> Bench:
    return Bench(shape, FuzzyRouter(load_rule_base("default"), shape.layers), getattr(torch, dtype), device)


def _operations_per_second(bench: Bench) -> float:
    """How fast this machine runs a short dense prefill, to foresee the longer ones."""
    form, length = bench.whole(), 64
    plans = torch.ones(1, bench.shape.layers).bool()
    seconds = take_turns(bench.clock, 2, {"": lambda: bench.prefill(form, 1, length)})[""]
    return prefill_flops(bench.shape.sizes, plans, length) / min(seconds)


def _does_not_fit(shape: Shape, dtype: str, device: str) -> str | None:
    needed, free = shape.parameters * getattr(torch, dtype).itemsize, available_bytes(device)
    if 1.2 * needed <= free:
        return None
    return f"weights need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _takes_too_long(cell: Cell, shape: Shape, grid: Grid, speed: float) -> str | None:
    dense = cell.prefill_flops * cell.closed_form
    seconds = grid.repeats * (dense + 2.5 * cell.prefill_flops) / speed
    return f"about {seconds:.0f} s, more than {grid.max_seconds:.0f}" if seconds > grid.max_seconds else None
