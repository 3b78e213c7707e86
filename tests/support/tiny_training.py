"""A tiny LLaVA checkpoint with its data, and the flags that train it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.train.arguments import takes
from llava.train.stages import STAGES
from playground.digits.base_model import IMAGE_SIZE, build_config
from playground.digits.generate import Settings, generate
from playground.digits.questions import IMAGE_QUESTIONS
from playground.digits.tokenizer import train_tokenizer

NUM_LAYERS, WIDTH, ADAPTER_WIDTH = 4, 32, 8


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint and what it trains on.

    Attributes:
        base: Folder of a dense checkpoint with random weights.
        data: 36 records, from the first on text only, image, text only, image, ...
        images: Image folder.
    """

    base: Path
    data: Path
    images: Path

    def flags(self, stage: str, model: Path, output: Path, **more: object) -> list[str]:
        """Flags of llava/train/train.py for a short run on the CPU; of the usual ones those that act in the stage."""
        values = {
            "stage": stage,
            "model_name_or_path": model,
            "data_path": self.data,
            "image_folder": self.images,
            "output_dir": output,
            "version": "digits",
            "use_cpu": True,
            "adapter_hidden_dim": ADAPTER_WIDTH,
            "target_skip_ratio": 0.25,
            "calibration_samples": 32,
            "order_samples": 8,
            "score_samples": 36,
            "calibration_batch_size": 8,
            "model_max_length": 512,
            "max_steps": 3,
            "per_device_train_batch_size": 1,
            "roe_lr": 1e-2,
            "backbone_lr": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 0,
            "disable_tqdm": True,
        }
        if stage in STAGES:
            values = {name: value for name, value in values.items() if takes(STAGES[stage], name)}
        values |= more
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def alternate(records: list[dict], number: int) -> list[dict]:
    """Text-only records and records with an image in turn, ``number`` of each."""
    text = [record for record in records if "image" not in record][:number]
    images = [record for record in records if "image" in record][:number]
    return [record for pair in zip(text, images, strict=True) for record in pair]


def build_checkpoint(records: list[dict], folder: Path) -> None:
    """Write a LLaVA checkpoint of 4 layers of width 32 with random weights."""
    tokenizer = train_tokenizer(records)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(build_config(tokenizer, WIDTH, NUM_LAYERS))
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)


def make_tiny(folder: Path) -> Tiny:
    """Make the data and the checkpoint in an empty folder; two seconds."""
    generate(folder / "digits", Settings(train=162, validation=1, test=len(IMAGE_QUESTIONS)))
    records = json.loads((folder / "digits" / "digits_train.json").read_text())
    (folder / "train.json").write_text(json.dumps(alternate(records, 18)))
    build_checkpoint(records, folder / "base")
    return Tiny(folder / "base", folder / "train.json", folder / "digits" / "images")
