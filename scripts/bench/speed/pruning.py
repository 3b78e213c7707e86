"""Skipped layers times pruned image tokens: a whole LLaVA prefill, vision tower and pruner included."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from llava.model.llava_llama import LlavaLlamaForCausalLM, attach_routing
from llava.model.token_pruning import prune_inputs, set_token_pruning
from scripts.bench.speed.lines import Line
from scripts.bench.speed.plans import Replayed, nested_plans, spread_skips
from scripts.bench.speed.shapes import Shape
from scripts.bench.speed.timing import Clock, take_turns

IMAGE_TOKEN, NUM_TEXT, KEPT = 3, 64, 192


def skip_times_prune(shape: Shape, num_text: int = NUM_TEXT, repeats: int = 5, device: str = "cpu") -> list[Line]:
    """Prefill at batch 1 with all 576 or 192 image tokens, dense or with half the layers skipped, of the first."""
    model, router = _build(shape)
    model, clock = model.to(device), Clock(device)
    inputs = {name: tensor.to(device) for name, tensor in _prompt(shape, num_text).items()}
    set_token_pruning(model, KEPT)
    shorter = prune_inputs(model, inputs, KEPT)
    half = nested_plans(shape.layers, spread_skips(shape.layers, 0.5, 1)).float().to(device)

    def prefill(batch: dict[str, Any], is_routed: bool) -> Any:
        def run() -> None:
            router.enabled, router.plans = is_routed, half
            with torch.inference_mode():
                model(**batch, use_cache=True, logits_to_keep=1)

        return run

    forms = {
        "dense, all 576 tokens": prefill(inputs, False),
        "skip 50%": prefill(inputs, True),
        f"prune to {KEPT} tokens": prefill(shorter, False),
        f"skip 50% x prune to {KEPT}": prefill(shorter, True),
    }
    take_turns(clock, 1, forms)
    times = take_turns(clock, repeats, forms)
    whole = times["dense, all 576 tokens"]
    return [
        Line.of(
            f"LLaVA prefill, batch 1, {576 + num_text} positions, {name}: speed-up",
            [base / mine for base, mine in zip(whole, values, strict=True)],
            unit="x",
        )
        for name, values in times.items()
    ]


def _build(shape: Shape) -> tuple[LlavaLlamaForCausalLM, Replayed]:
    """LLaVA with a small tower of LLaVA-1.5's resolution, so that the decoder is what matters."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=576)
    model = LlavaLlamaForCausalLM.adopt(LlavaForConditionalGeneration(config).eval())
    router = Replayed(FuzzyRouter(load_rule_base("default"), shape.layers), shape.layers)
    attach_routing(model, router, shape.adapter, "xavier")
    return model.eval(), router


def _prompt(shape: Shape, num_text: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(4, shape.vocabulary, (1, num_text), generator=generator)
    ids = torch.cat([torch.full((1, 576), IMAGE_TOKEN), text], dim=1)
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
