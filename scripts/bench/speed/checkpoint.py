"""Prefill of a trained checkpoint by its own plans, against the same checkpoint with routing off, batch 1."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fuzzyroe import detach, set_skip_rate
from fuzzyroe.attach import find_decoder_layers
from fuzzyroe.cache import kept_layers
from llava.conversation import get_template
from llava.inference.generator import Generator
from llava.model.builder import load_checkpoint
from scripts.bench.speed.lines import Line
from scripts.bench.speed.prompts import load_prompts
from scripts.bench.speed.shapes import shorten
from scripts.bench.speed.timing import Clock, Spread


@dataclass(frozen=True)
class CheckpointPrefill:
    """What was measured.

    Attributes:
        layers: Decoder layers.
        achieved_skip: Skipped share of them, mean over prompts.
        asked_skip: The mean skip rate that was asked for.
        prompts: Prompts of each turn.
        dense, routed: Milliseconds of a prompt.
        ratio, ideal_ratio: Routed over dense, and ideal over dense.
    """

    layers: int
    achieved_skip: float
    asked_skip: float
    prompts: int
    dense: Spread
    routed: Spread
    ratio: Spread
    ideal_ratio: Spread

    def __str__(self) -> str:
        return (
            f"prefill, batch 1, {self.layers} layers, skip {self.achieved_skip:.3f} (asked {self.asked_skip:g}): "
            f"dense {self.dense.median:.2f} ms, routed {self.routed.median:.2f} ms, ratio {self.ratio.median:.3f} "
            f"({self.ratio.lower:.3f} to {self.ratio.upper:.3f}), ideal {self.ideal_ratio.median:.3f}; medians over "
            f"{self.ratio.count} turns of {self.prompts} prompts"
        )

    def line(self) -> Line:
        """The bar: routed is faster than dense."""
        what = f"prefill, batch 1, {self.layers} layers, skip {self.achieved_skip:.3f}: routed of dense"
        return Line(what, self.ratio.median, at_most=1.0, spread=self.ratio)


def measure_checkpoint(model: str, data: Path, template: str, skip_rate: float, quick: bool) -> CheckpointPrefill:
    """Dense, routed and ideal prefill over questions about images; vision tower and projector are part of all.

    The ideal is the dense time less what the skipped layers take, by a copy of fewer layers, plus their adapters.
    """
    checkpoint = load_checkpoint(model)
    generator = Generator(checkpoint, get_template(template))
    prompts = load_prompts(generator, data, 40 if quick else 100, with_image=True)
    return measure_prompts(checkpoint.model.eval(), prompts, skip_rate, 10 if quick else 20)


@torch.inference_mode()
def measure_prompts(
    model: nn.Module, prompts: list[dict[str, Tensor]], skip_rate: float, repeats: int
) -> CheckpointPrefill:
    """The same, for a loaded model and prompts of batch 1."""
    layers, clock = find_decoder_layers(model), Clock("cpu")
    removed = max(1, round(skip_rate * len(layers)))
    short = shorten(model, len(layers) - removed, detach)
    set_skip_rate(model, skip_rate)
    caches = [model(**prompt, use_cache=True, logits_to_keep=1).past_key_values for prompt in prompts]
    skipped = statistics.mean(int((~kept_layers(cache, 1)).sum()) for cache in caches)
    times: dict[str, list[float]] = {"dense": [], "routed": [], "short": []}
    for _ in range(repeats):
        for name, variant, rate in (("dense", model, None), ("routed", model, skip_rate), ("short", short, None)):
            if variant is model:
                set_skip_rate(model, rate)
            times[name].append(clock.seconds(lambda m=variant: [_prefill(m, prompt) for prompt in prompts]))
    states = torch.randn(1, prompts[0]["input_ids"].shape[1], layers[0].input_layernorm.weight.shape[0])
    adapter = statistics.median(
        clock.seconds(lambda: [layer.skip_output(states) for layer in layers]) / len(layers) for _ in range(repeats)
    )
    per_layer = [(whole - short) / removed for whole, short in zip(times["dense"], times["short"], strict=True)]
    gain = [skipped * (layer - len(prompts) * adapter) for layer in per_layer]
    return CheckpointPrefill(
        layers=len(layers),
        achieved_skip=skipped / len(layers),
        asked_skip=skip_rate,
        prompts=len(prompts),
        dense=Spread.of([1e3 * seconds / len(prompts) for seconds in times["dense"]]),
        routed=Spread.of([1e3 * seconds / len(prompts) for seconds in times["routed"]]),
        ratio=Spread.of([mine / whole for mine, whole in zip(times["routed"], times["dense"], strict=True)]),
        ideal_ratio=Spread.of([1 - saved / whole for saved, whole in zip(gain, times["dense"], strict=True)]),
    )


def _prefill(model: nn.Module, prompt: dict[str, Tensor]) -> None:
    model(**prompt, use_cache=True, logits_to_keep=1)
