"""The playground's base model before training: a small LLaVA of transformers' own classes with random weights.

    python -m playground.digits.base_model --tokenizer DIR --output DIR --data DIR

CLIP vision tower (32 px images, 8 px patches, 16 image tokens), two-layer GELU projector, Llama decoder of 12 layers.
Everything a LLaVA checkpoint folder holds is written, so the folder is trained and loaded like any other.

With a dataset the tower learns to see digits before it is joined to a language model, as LLaVA's CLIP tower has.
Supervision is the digit (or emptiness) of each canvas cell, read by a linear probe from the mean of the cell's patch
features; the probe is thrown away. Only training canvases are used.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
)
from transformers import LlavaForConditionalGeneration as Llava
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.data.records import RecordFile
from llava.mm_utils import process_images

IMAGE_SIZE, PATCH_SIZE = 32, 8
EMPTY_CLASS, NUM_CLASSES, CELLS_PER_SIDE = 10, 11, 2

INITIALIZER_RANGE = 0.06
"""Standard deviation of random weights: stock 0.02 suits width 4096; about 1/sqrt(width) lets a narrow model start."""

POSITION_RANGE = 0.5
"""The same for the tower's position embeddings, so that where a patch lies is as loud as what it shows."""


def build_config(tokenizer: PreTrainedTokenizerFast, width: int = 112, num_layers: int = 12) -> LlavaConfig:
    """Configuration of the small LLaVA for a tokenizer that knows ``<image>``."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=96,
        initializer_range=INITIALIZER_RANGE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        **ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
        **ids,
    )


def build_base_model(tokenizer_folder: str | Path, output: str | Path, seed: int = 0) -> Llava:
    """Write the untrained base model, given back too, with its tokenizer and image processor to ``output``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    torch.manual_seed(seed)
    model = Llava(build_config(tokenizer))
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=POSITION_RANGE)
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids, max_new_tokens=64)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(output)
    return model


def pool_cells(patches: Tensor) -> Tensor:
    """Mean features of each cell, (B, cells, D), of patch features in reading order, (B, patches, D)."""
    side = IMAGE_SIZE // PATCH_SIZE
    grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (B, D, side, side)
    return F.avg_pool2d(grid, side // CELLS_PER_SIDE).flatten(2).transpose(1, 2)


def load_canvases(data: Path, limit: int) -> tuple[Tensor, Tensor]:
    """Canvases as bytes (n, 32, 32, 3) with the class of each cell (n, 4)."""
    pixels, classes = [], []
    for record in RecordFile(data / "digits_train.json"):
        if not record.images:
            continue
        with Image.open(data / "images" / record.images[0]) as image:
            pixels.append(np.asarray(image.convert("RGB")))
        classes.append([EMPTY_CLASS if digit is None else digit for digit in record.raw["digits"]])
        if len(pixels) == limit:
            break
    return torch.from_numpy(np.stack(pixels)), torch.tensor(classes)


def pretrain(tower: CLIPVisionModel, pixels: Tensor, classes: Tensor, steps: int, batch_size: int, seed: int) -> float:
    """Train the tower in place on normalised pixels, (n, 3, 32, 32), and classes of their cells, (n, 4).

    Returns:
        Share of cells read rightly over the last tenth of the steps.
    """
    torch.manual_seed(seed)
    probe = nn.Linear(tower.config.hidden_size, NUM_CLASSES)
    optimizer = torch.optim.AdamW([*tower.parameters(), *probe.parameters()], lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    right: list[float] = []
    for step in range(steps):
        chosen = torch.randint(len(pixels), (batch_size,))
        logits = probe(pool_cells(tower(pixels[chosen]).last_hidden_state[:, 1:]))
        loss = F.cross_entropy(logits.flatten(0, 1), classes[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right.append((logits.argmax(-1) == classes[chosen]).float().mean().item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, cells read {np.mean(right[-100:]):.3f}", flush=True)
    return float(np.mean(right[-max(steps // 10, 1) :]))


def main() -> None:
    """Write the model; with --data its vision tower has learned digits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of the trained tokenizer")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--data", type=Path, help="digits dataset that the vision tower learns from")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the vision tower")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--canvases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.time()
    model = build_base_model(arguments.tokenizer, arguments.output, arguments.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {parameters * 4 / 2**20:.2f} MiB in fp32, written to {arguments.output}")
    if arguments.data:
        canvases, classes = load_canvases(arguments.data, arguments.canvases)
        images = [Image.fromarray(canvas.numpy()) for canvas in canvases]
        pixels = process_images(images, CLIPImageProcessorPil.from_pretrained(arguments.output), model.config)
        asked = (arguments.steps, arguments.batch_size, arguments.seed)
        accuracy = pretrain(model.model.vision_tower, pixels, classes, *asked)
        model.save_pretrained(arguments.output)
        print(f"cells read {accuracy:.3f} on jittered training scans, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
