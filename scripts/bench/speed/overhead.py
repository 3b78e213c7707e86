"""What routing itself costs: the router of each policy, and the routed forward where nothing is skipped."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from fuzzyroe.routers import (
    FuzzyRouter,
    KeepAllRouter,
    LinearRouter,
    OracleRouter,
    RandomRouter,
    Router,
    StaticRouter,
)
from fuzzyroe.routers.roe.compat import PUBLISHED
from fuzzyroe.rules import load_rule_base
from scripts.bench.speed.lines import Line
from scripts.bench.speed.passes import Bench, prompt_state
from scripts.bench.speed.plans import nested_plans, spread_skips
from scripts.bench.speed.shapes import Shape
from scripts.bench.speed.timing import take_turns

TESTS = Path(__file__).resolve().parents[3] / "tests" / "support"


def policies(num_layers: int, width: int) -> dict[str, Router]:
    """A router of each policy, untrained: what it costs does not depend on what it has learnt."""
    oracle = OracleRouter(1000, num_layers // 2, num_layers)
    oracle.known.copy_(torch.arange(1000))
    oracle.losses.copy_(torch.arange(num_layers // 2 + 1).float().expand(1000, -1))
    return {
        "fuzzy": FuzzyRouter(load_rule_base("default"), num_layers),
        "linear, routing tokens": LinearRouter(num_layers, width, "tokens"),
        "linear, routing tokens as published": LinearRouter(num_layers, width, "tokens", PUBLISHED),
        "linear, pooled": LinearRouter(num_layers, width, "pooled"),
        "random": RandomRouter(num_layers, target_skip_ratio=0.5),
        "static": StaticRouter(num_layers, list(range(1, num_layers)), 0.5),
        "oracle": oracle,
        "none": KeepAllRouter(num_layers),
    }


def router_share(bench: Bench, length: int) -> list[Line]:
    """The fuzzy router with its features, of a routed prefill that skips half the layers, the quickest prefill here."""
    bench.set_policy(policies(bench.shape.layers, bench.shape.width)["fuzzy"])
    router, skip = bench.router.router.to(bench.device), bench.shape.layers // 2
    plans = nested_plans(bench.shape.layers, [skip])
    states = torch.randn(1, length, bench.shape.width, device=bench.device, dtype=bench.dtype)

    @torch.inference_mode()
    def plan() -> None:
        for _ in range(5):
            router.plan(states, prompt_state(1, length, bench.device))

    calls = {"plan": plan, "prefill": lambda: bench.prefill(bench.planned(plans), 1, length)}
    take_turns(bench.clock, 1, calls)
    times = take_turns(bench.clock, 5, calls)
    shares = [100 * one / 5 / whole for one, whole in zip(times["plan"], times["prefill"], strict=True)]
    bar = 1.0 if bench.shape.width >= 1024 else None
    return [
        Line.of("router and features, of a prefill at skip 50%, batch 1", shares, at_most=bar, unit=" %"),
        Line.of("  router and features", [1e3 * seconds / 5 for seconds in times["plan"]], unit=" ms"),
    ]


def policy_overheads(bench: Bench, length: int, repeats: int = 5) -> list[Line]:
    """A prefill at batch 1 under every policy, of one with the same plan and a router that does nothing."""
    sizes = bench.shape.layers, bench.shape.width
    plans = nested_plans(sizes[0], spread_skips(sizes[0], 0.5, 1))
    routers = {"nothing": KeepAllRouter(sizes[0]), **policies(*sizes)}
    seconds: dict[str, list[float]] = {name: [] for name in routers}
    for turn in range(repeats + 1):
        for name, router in routers.items():
            bench.set_policy(router.to(bench.device, bench.dtype).eval())
            taken = bench.clock.seconds(lambda: bench.prefill(bench.planned(plans), 1, length))
            if turn:  # the first warms up
                seconds[name].append(taken)
    return [
        Line.of(
            f"policy {name}: overhead of a prefill at skip 50%, batch 1",
            [100 * (mine / base - 1) for mine, base in zip(seconds[name], seconds["nothing"], strict=True)],
            unit=" %",
        )
        for name in routers
        if name != "nothing"
    ]


def decode_counts(bench: Bench, length: int, steps: int = 8) -> list[Line]:
    """Router calls and host transfers of decoding, counted in a batch of mixed plans after a real prefill."""
    try:
        sys.path.append(str(TESTS))
        from host_transfers import HostTransfers
    except ImportError:
        return [Line("decode: host transfers", None, at_most=0, note=f"{TESTS} is needed to count them")]
    finally:
        sys.path.remove(str(TESTS))
    form = bench.planned(nested_plans(bench.shape.layers, spread_skips(bench.shape.layers, 0.5)))
    cache = bench.prefill(form, len(form.plans), length)
    calls = bench.router.calls
    with HostTransfers(("fuzzyroe", "llava")) as transfers:
        bench.decode(form, cache, len(form.plans), steps)
    where = ", ".join(transfers.places)
    return [
        Line(f"decode, {steps} steps, batch 8: router calls", bench.router.calls - calls, at_most=0),
        Line(f"decode, {steps} steps, batch 8: host transfers", transfers.places.total(), at_most=0, note=where),
    ]


def forward_overhead(bench: Bench, length: int) -> list[Line]:
    """Decoding where nothing is skipped, routed against stock, on layers too small to cost anything themselves."""
    small = Bench(Shape("tiny", 64, bench.shape.layers, 4, 4, 128, 100), KeepAllRouter(bench.shape.layers))
    step = _step_difference(small, 64, 20)
    whole = statistics.median(_step_seconds(bench, length)) / bench.shape.layers
    bar = 1.0 if bench.shape.width >= 1024 and not bench.clock.is_cuda else None
    return [
        Line.of("routed forward in decoding, per layer", [1e6 * seconds for seconds in step], unit=" us"),
        Line("  of a dense layer", 100 * max(statistics.median(step), 0.0) / whole, at_most=bar, unit=" %"),
    ]


def _step_difference(bench: Bench, length: int, steps: int) -> list[float]:
    """Seconds per layer that a routed step takes more than a stock one, of repeated turns."""
    forms = {"stock": bench.whole(), "routed": bench.planned(nested_plans(bench.shape.layers, [0]))}
    caches = {name: bench.filled(form, 1, length) for name, form in forms.items()}
    calls = {name: lambda n=name: bench.decode(forms[n], caches[n], 1, steps) for name in forms}
    take_turns(bench.clock, 1, calls)
    times = take_turns(bench.clock, 15, calls)
    layers = steps * bench.shape.layers
    return [(mine - stock) / layers for mine, stock in zip(times["routed"], times["stock"], strict=True)]


def _step_seconds(bench: Bench, length: int) -> list[float]:
    form = bench.whole()
    cache = bench.filled(form, 1, length)
    return [seconds / 2 for seconds in take_turns(bench.clock, 5, {"": lambda: bench.decode(form, cache, 1, 2)})[""]]
