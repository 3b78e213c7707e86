#!/usr/bin/env python
"""Prefill of a routed checkpoint against the same checkpoint with routing off, batch 1, in one run.

    python scripts/bench/prefill.py --model outputs/quickstart/finetune --json prefill.json --check

All prompts are run dense, routed, and by a dense model with layers removed, block after block in turns; times are
CPU process time (wall time on a GPU) and medians. The ideal is the dense time less what the skipped layers take, plus
what their adapters take, both measured here. Bar: at the asked skip rate the routed prefill is faster than the dense.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fuzzyroe.attach import detach, find_decoder, find_decoder_layers
from llava.conversation import get_template
from llava.data.image_files import open_rgb
from llava.data.preprocess import encode_prompt
from llava.data.records import RecordFile, resolve_image
from llava.image_tokens import count_image_tokens
from llava.mm_utils import process_images
from llava.model.builder import Checkpoint, load_checkpoint
from llava.model.routing import set_budget


def load_prompts(checkpoint: Checkpoint, data: Path, template: str, number: int) -> list[dict[str, torch.Tensor]]:
    """Image questions of the test set as model inputs, batch 1, drawn with a fixed seed."""
    records = RecordFile(data / "digits_test.json")
    chosen = [record for record in records if record.images]
    prompts = []
    for record in random.Random(0).sample(chosen, number):
        conversation = get_template(template)
        conversation.append_message(conversation.roles[0], record.turns[0].question)
        conversation.append_message(conversation.roles[1], None)
        config = checkpoint.model.config
        ids, _ = encode_prompt(conversation, checkpoint.tokenizer, count_image_tokens(config), config.image_token_index)
        image = open_rgb(resolve_image(data / "images", record.images[0]))
        pixels = process_images([image], checkpoint.image_processor, config)
        input_ids = torch.tensor([ids])
        prompts.append(
            {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}
        )
    return prompts


def remove_layers(model: torch.nn.Module, number: int) -> torch.nn.Module:
    """A stock dense copy with ``number`` layers fewer."""
    short = detach(copy.deepcopy(model))
    short.model._forward_pre_hooks.clear()
    decoder = find_decoder(short)
    decoder.layers = decoder.layers[: len(decoder.layers) - number]
    decoder.config.num_hidden_layers = len(decoder.layers)
    return short


def prefill_seconds(model: torch.nn.Module, prompt: dict[str, torch.Tensor]) -> float:
    """CPU seconds of one prefill with a cache."""
    started = time.process_time()
    model(**prompt, use_cache=True, logits_to_keep=1)
    return time.process_time() - started


@torch.no_grad()
def measure(checkpoint: Checkpoint, prompts: list[dict], skip_rate: float, repeats: int) -> dict:
    """Time blocks of dense, routed and shortened prefills over all prompts, as a server runs them, in turns."""
    model = checkpoint.model.eval()
    layers, decoder = find_decoder_layers(model), find_decoder(model)
    removed = max(1, round(skip_rate * len(layers)))
    short = remove_layers(model, removed)
    kept: list[int] = []
    count = decoder.register_forward_hook(
        lambda module, args, kwargs, output: kept.append(int(kwargs["routing"].decisions().sum())), with_kwargs=True
    )
    set_budget(model, skip_rate)
    for prompt in prompts:
        model(**prompt, use_cache=True, logits_to_keep=1)
    count.remove()
    skipped = len(layers) - statistics.mean(kept)
    times: dict[str, list[float]] = {"dense": [], "routed": [], "short": []}
    variants = {"dense": (model, None), "routed": (model, skip_rate), "short": (short, None)}
    for _ in range(repeats):
        for name, (variant, rate) in variants.items():
            if variant is model:
                set_budget(model, rate)
            times[name].extend(prefill_seconds(variant, prompt) for prompt in prompts)
    states = torch.randn(1, prompts[0]["input_ids"].shape[1], decoder.config.hidden_size)
    adapter = []
    for _ in range(50 * repeats):
        started = time.process_time()
        layers[0].skip_output(states)
        adapter.append(time.process_time() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    layer_time = (median["dense"] - median["short"]) / removed
    ideal = median["dense"] - skipped * (layer_time - statistics.median(adapter))
    return {
        "layers": len(layers),
        "achieved_skip": skipped / len(layers),
        "dense_ms": 1e3 * median["dense"],
        "routed_ms": 1e3 * median["routed"],
        "adapter_ms": 1e3 * statistics.median(adapter),
        "ratio": median["routed"] / median["dense"],
        "ideal_ratio": ideal / median["dense"],
        "prompts": len(prompts),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart/finetune")
    parser.add_argument("--data", type=Path, default=Path("playground/data/digits"))
    parser.add_argument("--template", default="digits")
    parser.add_argument("--skip-rate", type=float, default=0.25)
    parser.add_argument("--quick", action="store_true", help="fewer prompts and repeats")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 where the bar is not met")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(arguments.model)
    number, repeats = (40, 10) if arguments.quick else (100, 20)
    prompts = load_prompts(checkpoint, arguments.data, arguments.template, number)
    result = measure(checkpoint, prompts, arguments.skip_rate, repeats)
    print(
        f"prefill, batch 1, {result['layers']} layers, skip {result['achieved_skip']:.3f} "
        f"(asked {arguments.skip_rate}): dense {result['dense_ms']:.2f} ms, routed {result['routed_ms']:.2f} ms, "
        f"ratio {result['ratio']:.3f}, ideal {result['ideal_ratio']:.3f}; medians of process time over "
        f"{result['prompts']} prompts x {result['repeats']}, {result['threads']} thread"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.check and not result["ratio"] < 1:
        print(f"bar not met: routed prefill is {result['ratio']:.3f} of dense, must be below 1", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
