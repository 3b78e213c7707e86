"""What routing itself costs: the router of each policy, and the routed forward where nothing is skipped; and pruning
of image tokens beside skipped layers."""

from __future__ import annotations

import functools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from fuzzyroe.routers import FuzzyRouter, KeepAllRouter, LinearRouter, OracleRouter, RandomRouter, Router, StaticRouter
from fuzzyroe.routers.roe.training import PUBLISHED
from fuzzyroe.rules import load_rule_base
from llava.model.llava_llama import LlavaLlamaForCausalLM, attach_routing
from llava.model.token_pruning import prune_inputs, set_token_pruning
from scripts.bench.bench import Clock, Line, take_turns
from scripts.bench.speed.decoders import Bench, Replayed, Shape, nested_plans, prompt_state, random_pixels, spread_skips

TESTS = Path(__file__).resolve().parents[3] / "tests" / "support"
IMAGE_TOKEN, NUM_TEXT, KEPT = 3, 64, 192


def policies(num_layers: int, width: int) -> dict[str, Router]:
    """A router of each policy, untrained: what it costs does not depend on what it has learnt."""
    oracle, base = OracleRouter(1000, num_layers // 2, num_layers), load_rule_base("default")
    oracle.known.copy_(torch.arange(1000))
    oracle.losses.copy_(torch.arange(num_layers // 2 + 1).float().expand(1000, -1))
    return {
        "fuzzy": FuzzyRouter(base, num_layers),
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
    router, form = bench.router.router.to(bench.device), bench.skipping(bench.shape.layers // 2)
    states = torch.randn(1, length, bench.shape.width, device=bench.device, dtype=bench.dtype)

    @torch.inference_mode()
    def plan() -> None:
        for _ in range(5):
            router.plan(states, prompt_state(1, length, bench.device))

    times = take_turns(bench.clock, 5, {"plan": plan, **bench.prefills({"prefill": form}, 1, length)}, warm_up=True)
    seconds = [five / 5 for five in times["plan"]]
    shares = [100 * one / whole for one, whole in zip(seconds, times["prefill"], strict=True)]
    bar = 1.0 if bench.shape.width >= 1024 else None
    return [
        Line.of("router and features, of a prefill at skip 50%, batch 1", shares, at_most=bar, unit=" %"),
        Line.of("  router and features", seconds, 1e3, unit=" ms"),
    ]


def policy_overheads(bench: Bench, length: int, repeats: int = 5) -> list[Line]:
    """A prefill at batch 1 under every policy, of one with the same plan and a router that does nothing."""
    num_layers = bench.shape.layers
    form = bench.skipping(*spread_skips(num_layers, 0.5, 1))

    def prefill(router: Router) -> None:
        bench.set_policy(router)
        bench.prefill(form, 1, length)

    routers = {"nothing": KeepAllRouter(num_layers), **policies(num_layers, bench.shape.width)}
    routers = {name: router.to(bench.device, bench.dtype).eval() for name, router in routers.items()}
    calls = {name: functools.partial(prefill, router) for name, router in routers.items()}
    seconds = take_turns(bench.clock, repeats, calls, warm_up=True)
    nothing = seconds.pop("nothing")
    return [
        Line.of(
            f"policy {name}: overhead of a prefill at skip 50%, batch 1",
            [100 * (mine / base - 1) for mine, base in zip(taken, nothing, strict=True)],
            unit=" %",
        )
        for name, taken in seconds.items()
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
    form = bench.skipping(*spread_skips(bench.shape.layers, 0.5))
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
    num_layers, steps = bench.shape.layers, 20
    small = Bench(Shape("tiny", 64, num_layers, 4, 4, 128, 100), KeepAllRouter(num_layers))
    calls = small.decodes({"stock": small.whole(), "routed": small.skipping(0)}, 1, 64, steps)
    times = take_turns(small.clock, 15, calls, warm_up=True)
    more = [(a - b) / steps / num_layers for a, b in zip(times["routed"], times["stock"], strict=True)]
    whole = take_turns(bench.clock, 5, bench.decodes({"": bench.whole()}, 1, length, 2))[""]
    layer = statistics.median(whole) / 2 / num_layers
    bar = 1.0 if bench.shape.width >= 1024 and not bench.clock.is_cuda else None
    return [
        Line.of("routed forward in decoding, per layer", more, 1e6, unit=" us"),
        Line("  of a dense layer", 100 * max(statistics.median(more), 0.0) / layer, at_most=bar, unit=" %"),
    ]


def skip_times_prune(shape: Shape, num_text: int = NUM_TEXT, repeats: int = 5, device: str = "cpu") -> list[Line]:
    """Prefill at batch 1 with all 576 or 192 image tokens, dense or with half the layers skipped, of the first."""
    # a small tower of LLaVA-1.5's resolution, so that the decoder is what matters
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
    config = LlavaConfig(
        vision_config=vision, text_config=shape.config(), image_token_id=IMAGE_TOKEN, image_seq_length=576
    )
    model = LlavaLlamaForCausalLM.adopt(LlavaForConditionalGeneration(config).eval())
    router = Replayed(FuzzyRouter(load_rule_base("default"), shape.layers), shape.layers)
    attach_routing(model, router, shape.width // 4, "xavier")
    model = model.eval().to(device)
    text = torch.randint(4, shape.vocabulary, (1, num_text), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.full((1, 576), IMAGE_TOKEN), text], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": random_pixels()}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    set_token_pruning(model, KEPT)
    shorter = prune_inputs(model, inputs, KEPT)
    half = nested_plans(shape.layers, spread_skips(shape.layers, 0.5, 1)).float().to(device)

    @torch.inference_mode()
    def prefill(batch: dict[str, Any], is_routed: bool) -> None:
        router.enabled, router.plans = is_routed, half
        model(**batch, use_cache=True, logits_to_keep=1)

    forms = {
        "dense, all 576 tokens": (inputs, False),
        "skip 50%": (inputs, True),
        f"prune to {KEPT} tokens": (shorter, False),
        f"skip 50% x prune to {KEPT}": (shorter, True),
    }
    calls = {name: functools.partial(prefill, *form) for name, form in forms.items()}
    times = take_turns(Clock(device), repeats, calls, warm_up=True)
    what = f"LLaVA prefill, batch 1, {576 + num_text} positions"
    whole = times["dense, all 576 tokens"]
    return [Line.ratio(f"{what}, {name}: speed-up", whole, values, unit="x") for name, values in times.items()]
