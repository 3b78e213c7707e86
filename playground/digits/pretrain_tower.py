"""The vision tower learns to see digits before it is joined to a language model, as LLaVA's CLIP tower has.

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
from transformers import CLIPVisionModel, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.data.records import RecordFile
from llava.mm_utils import process_images
from playground.digits.base_model import IMAGE_SIZE, PATCH_SIZE

EMPTY_CLASS, NUM_CLASSES, CELLS_PER_SIDE = 10, 11, 2


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
    """Command line: ``python -m playground.digits.pretrain_tower --model DIR --data DIR``, changing the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--canvases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.time()
    model = LlavaForConditionalGeneration.from_pretrained(arguments.model)
    processor = CLIPImageProcessorPil.from_pretrained(arguments.model)
    canvases, classes = load_canvases(arguments.data, arguments.canvases)
    images = [Image.fromarray(canvas.numpy()) for canvas in canvases]
    pixels = process_images(images, processor, model.config)
    asked = (arguments.steps, arguments.batch_size, arguments.seed)
    accuracy = pretrain(model.model.vision_tower, pixels, classes, *asked)
    model.save_pretrained(arguments.model)
    print(f"cells read {accuracy:.3f} on jittered training scans, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
