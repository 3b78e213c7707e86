"""Promises of LoRA: what a stage saves is loaded as it was trained, from wherever it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from layouts import build_parts, write_hub
from llava.model.builder import Checkpoint, build_checkpoint, load_checkpoint
from llava.model.checkpoints.convert import ConvertOptions, convert
from llava.model.checkpoints.reading import compose
from llava.model.families import VisionSettings
from llava.train.arguments import LlavaTrainingArguments
from llava.train.checkpointing import save_stage
from llava.train.parameters import add_lora
from llava.train.stages import choose_stage
from parity import our_logits
from routed_llava import route

BOUND = 2e-4  # logits of merged weights; the order of float32 sums differs between processors (1.2e-4 on one)
"""A merged update is rounded otherwise than one that is added to each output."""


def train(checkpoint: Checkpoint, stage: str, output: Path, **flags: bool) -> dict[str, torch.Tensor]:
    """Add updates, move all that a stage trains, save; gives the logits after it."""
    add_lora(checkpoint.model, 2, 8, 0.0)
    chosen = choose_stage(stage, lora=True, **flags)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for name, parameter in checkpoint.model.named_parameters():
            if "lora_" in name or ("projector" in chosen.trains and "multi_modal_projector" in name):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    expected = our_logits(checkpoint.model.eval(), checkpoint.tokenizer, checkpoint.image_processor, "left")
    trainer = SimpleNamespace(
        model=checkpoint.model,
        args=LlavaTrainingArguments(output_dir=str(output.with_name(output.name + ".partial")), use_cpu=True),
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
    )
    save_stage(trainer, checkpoint, chosen, output, {"stage": stage})
    return expected


def assert_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Assert that a folder is loaded with these logits."""
    loaded = load_checkpoint(folder)
    found = our_logits(loaded.model.eval(), loaded.tokenizer, loaded.image_processor, "left")
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= BOUND


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A LLaVA, in ``parts/base``."""
    (tmp_path / "parts").mkdir()
    write_hub(build_parts(tmp_path / "parts"), tmp_path / "parts" / "base")
    return tmp_path / "parts" / "base"


@pytest.mark.parametrize("flags", [{}, {"freeze_projector": True}])
def test_updates_of_a_llava_are_loaded_as_trained(base: Path, tmp_path: Path, flags: dict) -> None:
    before = load_checkpoint(base)
    dense = our_logits(before.model, before.tokenizer, before.image_processor, "left")
    expected = train(before, "dense", tmp_path / "parts" / "lora", **flags)
    assert min(float((expected[name] - dense[name]).abs().max()) for name in dense) > 0.01
    config = json.loads((tmp_path / "parts" / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    shutil.move(tmp_path / "parts", tmp_path / "moved")
    assert_equal(tmp_path / "moved" / "lora", expected)
    convert(tmp_path / "moved" / "lora", tmp_path / "whole", ConvertOptions())
    assert_equal(tmp_path / "whole", expected)


def test_updates_of_a_routed_llava_are_loaded_with_their_router(base: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(base)
    route(checkpoint.model)
    expected = train(checkpoint, "finetune", tmp_path / "parts" / "lora")
    assert load_checkpoint(tmp_path / "parts" / "lora").routing.stage == "finetune"
    assert_equal(tmp_path / "parts" / "lora", expected)


def test_updates_of_a_language_model_bring_its_vision_tower(base: Path, tmp_path: Path) -> None:
    """Also where the projector stayed as it was drawn: no base has it."""
    parts = tmp_path / "parts"
    settings = VisionSettings(str(parts / "clip"))
    composed = compose(parts / "language model", settings)
    checkpoint = build_checkpoint(composed, parts / "language model", torch.float32, "sdpa")
    expected = train(checkpoint, "dense", parts / "lora", freeze_projector=True)
    assert_equal(parts / "lora", expected)
