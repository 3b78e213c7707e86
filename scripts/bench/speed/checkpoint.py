"""Prefill of a trained checkpoint by its own plans, against the same checkpoint with routing off, batch 1."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder_layers
from fuzzyroe.cache import kept_layers
from llava.conversation import get_template
from llava.inference.generator import Generator
from llava.model.builder import load_checkpoint
from playground.compare.answers import read_message
from scripts.bench.bench import Clock, Line, take_turns
from scripts.bench.speed.decoders import shorten

Inputs = dict[str, Tensor]


def load_prompts(generator: Generator, data: Path, number: int, with_image: bool = False) -> list[Inputs]:
    """Questions of the digits test set as inputs of batch 1, drawn with a fixed seed.

    Args:
        generator: The checkpoint.
        data: Folder of the dataset, with ``digits_test.json`` and ``images``.
        number: Prompts to draw.
        with_image: Draw from questions about images only.
    """
    records = json.loads((data / "digits_test.json").read_text())
    drawn = random.Random(0).sample([record for record in records if record.get("image") or not with_image], number)
    return [generator.encode([read_message(record, data)]) for record in drawn]


def measure_checkpoint(model: str, data: Path, template: str, skip_rate: float, quick: bool) -> list[Line]:
    """Dense, routed and ideal prefill over questions about images; vision tower and projector are part of all."""
    checkpoint = load_checkpoint(model)
    generator = Generator(checkpoint, get_template(template))
    prompts = load_prompts(generator, data, 40 if quick else 100, with_image=True)
    return measure_prompts(checkpoint.model.eval(), prompts, skip_rate, 10 if quick else 20)


@torch.inference_mode()
def measure_prompts(model: nn.Module, prompts: list[Inputs], skip_rate: float, repeats: int) -> list[Line]:
    """The same, for a loaded model and prompts of batch 1.

    The ideal is the dense time less what the skipped layers take, by a copy of fewer layers, plus their adapters.
    """
    layers, clock = find_decoder_layers(model), Clock()
    removed = max(1, round(skip_rate * len(layers)))
    short = shorten(model, len(layers) - removed)
    set_skip_rate(model, skip_rate)
    caches = [model(**prompt, use_cache=True, logits_to_keep=1).past_key_values for prompt in prompts]
    skipped = statistics.mean(int((~kept_layers(cache, 1)).sum()) for cache in caches)

    def prefill(variant: nn.Module, rate: float | None) -> None:
        if variant is model:
            set_skip_rate(model, rate)
        for prompt in prompts:
            variant(**prompt, use_cache=True, logits_to_keep=1)

    variants = {"dense": (model, None), "routed": (model, skip_rate), "short": (short, None)}
    times = take_turns(clock, repeats, {name: lambda v=variant: prefill(*v) for name, variant in variants.items()})
    states = torch.randn(1, prompts[0]["input_ids"].shape[1], layers[0].input_layernorm.weight.shape[0])
    adapter = statistics.median(
        clock.seconds(lambda: [layer.skip_output(states) for layer in layers]) / len(layers) for _ in range(repeats)
    )
    ideal = [
        whole - skipped * ((whole - less) / removed - len(prompts) * adapter)
        for whole, less in zip(times["dense"], times["short"], strict=True)
    ]
    what = f"prefill, batch 1, {len(layers)} layers, skip {skipped / len(layers):.3f} (target {skip_rate:g})"
    note = f"medians over {repeats} turns of {len(prompts)} prompts"
    milliseconds = 1e3 / len(prompts)
    return [
        Line.ratio(f"{what}: routed of dense", times["routed"], times["dense"], at_most=1.0, note=note),
        Line.ratio("  ideal of dense", ideal, times["dense"]),
        Line.of("  dense", times["dense"], milliseconds, unit=" ms"),
        Line.of("  routed", times["routed"], milliseconds, unit=" ms"),
        Line("  skip rate", skipped / len(layers)),
    ]
