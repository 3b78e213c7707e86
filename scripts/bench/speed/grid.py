"""A table over sizes, data types, batches, prompts and skip rates: times against dense and ideal, memory, counts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.flops import decode_flops, prefill_flops
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from scripts.bench.bench import Spread, available_bytes, peak_bytes, take_turns
from scripts.bench.speed.decoders import SHAPES, Bench, Shape, cache_bytes, nested_plans, spread_skips

STEPS = 4

Cell = dict[str, Any]
"""One line of the table; times in milliseconds, of a whole batch, as ``Spread``.

``size``, ``dtype``, ``batch``, ``prompt``, ``skip_rate`` say which; ``achieved_skip`` is the skipped share of layers
over all rows. ``prefill_dense``, ``_routed``, ``_ideal`` and ``decode_dense``, ``_routed``, ``_ideal``, one step.
``prefill_peak_bytes``: memory of a routed prefill beyond the weights, cache included, None where unknown. ``kv_bytes``
and their share of the dense model's, ``kv_share``. ``prefill_flops``, ``decode_flops`` and the speed-up of the prefill
by those counts, ``closed_form``. ``not_run`` says why there are no times, None where there are.
"""


def measure_grid(
    sizes: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    prompts: Sequence[int],
    skip_rates: Sequence[float],
    device: str = "cpu",
    repeats: int = 5,
    max_seconds: float = 30.0,
) -> Iterator[Cell]:
    """Measure cell after cell; one decoder is held at a time, and what is expected to take longer is left out."""
    for size, dtype in itertools.product(sizes, dtypes):
        shape = SHAPES[size]
        lack = _does_not_fit(shape, dtype, device)
        if not lack:
            bench = Bench(shape, FuzzyRouter(load_rule_base("default"), shape.layers), getattr(torch, dtype), device)
            speed = _operations_per_second(bench)
        for batch, prompt, rate in itertools.product(batches, prompts, skip_rates):
            cell = {"size": size, "dtype": dtype, "batch": batch, "prompt": prompt, "skip_rate": rate}
            plans = nested_plans(shape.layers, spread_skips(shape.layers, rate, batch))
            cell |= _counts(shape, plans, prompt)
            why = lack
            if not lack:
                dense = cell["prefill_flops"] * cell["closed_form"]
                seconds = repeats * (dense + 2.5 * cell["prefill_flops"]) / speed
                why = f"about {seconds:.0f} s, more than {max_seconds:.0f}" if seconds > max_seconds else None
            yield {**cell, "not_run": why, **({} if why else _measure(bench, batch, prompt, plans, repeats))}


def _counts(shape: Shape, plans: Tensor, prompt: int) -> Cell:
    routed = prefill_flops(shape.sizes, plans, prompt)
    return {
        "achieved_skip": 1 - float(plans.float().mean()),
        "prefill_flops": routed,
        "decode_flops": decode_flops(shape.sizes, plans, prompt + 1),
        "closed_form": prefill_flops(shape.sizes, torch.ones_like(plans), prompt) / routed,
    }


def _measure(bench: Bench, batch: int, length: int, plans: Tensor, repeats: int) -> Cell:
    skip = round(statistics.mean((~plans).sum(dim=1).tolist()))
    forms = {"dense": bench.whole(), "routed": bench.planned(plans), "ideal": bench.ideal(skip)}
    bench.prefill(forms["routed"], batch, length)
    cell: Cell = {}
    for what, calls, positions, steps in (
        ("prefill", bench.prefills(forms, batch, length), length, 1),
        ("decode", bench.decodes(forms, batch, length, STEPS), 1, STEPS),
    ):
        times = take_turns(bench.clock, repeats, calls, warm_up=what == "decode")
        adapters = skip * bench.adapter_seconds(batch, positions) * steps
        times["ideal"] = [seconds + adapters for seconds in times["ideal"]]
        spreads = {name: Spread.of([1e3 * s / steps for s in values]) for name, values in times.items()}
        cell |= {f"{what}_{name}": spread for name, spread in spreads.items()}
    del calls  # it holds the caches
    stored = {name: cache_bytes(bench.filled(form, batch, length)) for name, form in forms.items()}
    peak = peak_bytes(lambda: bench.prefill(forms["routed"], batch, length), bench.device)
    cell |= {"kv_bytes": stored["routed"], "kv_share": stored["routed"] / stored["dense"], "prefill_peak_bytes": peak}
    return cell


def to_row(cell: Cell) -> dict[str, str]:
    """A cell as a row of the Markdown table; "of ideal" is ideal over routed, 1 at best."""
    row = {name: str(cell[name]) for name in ("size", "dtype", "batch", "prompt")}
    row["skip"] = f"{cell['achieved_skip']:.0%}"
    if cell["not_run"]:
        return {**row, "prefill dense ms": f"not run: {cell['not_run']}"}
    for what in ("prefill", "decode"):
        dense, routed, ideal = (cell[f"{what}_{name}"] for name in ("dense", "routed", "ideal"))
        row |= {f"{what} dense ms": str(dense), f"{what} routed": str(routed)}
        row[f"{what} of dense"] = f"{routed.median / dense.median:.3f}"
        row[f"{what} of ideal"] = f"{ideal.median / routed.median:.3f}"
    peak = cell["prefill_peak_bytes"]
    return row | {
        "closed form": f"{cell['closed_form']:.2f}x",
        "KV MiB": f"{cell['kv_bytes'] / 2**20:.1f} ({cell['kv_share']:.2f})",
        "peak MiB": "" if peak is None else f"{peak / 2**20:.0f}",
        "GFLOP prefill, step": f"{cell['prefill_flops'] / 1e9:.0f}, {cell['decode_flops'] / 1e9:.2f}",
    }


def _operations_per_second(bench: Bench) -> float:
    """How fast this machine runs a short dense prefill, to foresee the longer ones."""
    length, plans = 64, torch.ones(1, bench.shape.layers).bool()
    seconds = take_turns(bench.clock, 2, bench.prefills({"": bench.whole()}, 1, length))[""]
    return prefill_flops(bench.shape.sizes, plans, length) / min(seconds)


def _does_not_fit(shape: Shape, dtype: str, device: str) -> str | None:
    needed, free = shape.parameters * getattr(torch, dtype).itemsize, available_bytes(device)
    if 1.2 * needed <= free:
        return None
    return f"weights need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
