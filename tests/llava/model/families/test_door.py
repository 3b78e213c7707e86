"""Promise of the door for a base: one record, defined here alone, is recognised, loaded, saved and trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fuzzyroe.attach import attach
from layouts import build_parts, original_config, original_weights, save, write_sentencepiece
from llava.model import families
from llava.model.builder import load_checkpoint
from llava.model.checkpoints.convert import ConvertOptions, convert
from llava.model.families.llava15 import LLAVA15
from llava.train.parameters import freeze_all_but
from llava.train.stages import STAGES

TOY = replace(
    LLAVA15,
    name="toy",
    title="Toy",
    # the key stays in the configuration, so that both layouts are recognised
    recognises=lambda settings: "toy_tower" in settings,
    parts={"lm.": "lm", "eye.": "eye"},
    to_hf=families.KeyMap(
        (
            (r"lm\.head\.", "language_model.lm_head."),
            (r"lm\.(layers\.\d+|embed_tokens|norm)\.", r"language_model.model.\1."),
            (r"eye\.bridge\.(\d)\.", r"multi_modal_projector.linear_\1."),
            (r"eye\.", "vision_tower.vision_model."),
            *LLAVA15.to_hf.rules,
        )
    ),
    to_original=families.KeyMap(
        (
            (r"language_model\.lm_head\.", "lm.head."),
            (r"language_model\.model\.", "lm."),
            (r"multi_modal_projector\.linear_(\d)\.", r"eye.bridge.\1."),
            (r"vision_tower\.vision_model\.", "eye."),
        )
    ),
    unused=(r"eye\.pooling\..*",),
    build_config=lambda settings, path, tokenizer: _build_config(settings, path, tokenizer),
    original_config=lambda *given: {**LLAVA15.original_config(*given), "toy_tower": given[1]},
    trainable_parts={"vision_tower": ("vision_tower.",), "projector": ("multi_modal_projector.",)},
)


def _build_config(settings: Any, path: str, tokenizer: Any) -> Any:
    config = LLAVA15.build_config({**settings, "mm_vision_tower": settings["toy_tower"]}, path, tokenizer)
    config.toy_tower = settings["toy_tower"]
    return config


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy checkpoint in its original layout: two folders of weights under names of its own."""
    monkeypatch.setattr(families, "FAMILIES", (TOY, LLAVA15))
    (tmp_path / "parts").mkdir()
    parts, folder = build_parts(tmp_path / "parts"), tmp_path / "toy"
    names = {TOY.original_name(name): tensor for name, tensor in original_weights(parts, True).items()}
    for prefix, part in (("lm.", "lm"), ("eye.", "eye")):
        (folder / part).mkdir(parents=True)
        extra = {"pooling.weight": torch.zeros(2)} if part == "eye" else {}
        weights = {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}
        save(weights | extra, folder / part / "model.safetensors")
    settings = original_config(parts)
    settings["toy_tower"] = settings.pop("mm_vision_tower")
    (folder / "config.json").write_text(json.dumps(settings))
    write_sentencepiece(parts, folder)
    LLAVA15.image_processor(str(parts.tower)).save_pretrained(folder)
    return folder


def test_a_family_of_one_file_is_loaded_saved_attached_and_trained(toy: Path, tmp_path: Path) -> None:
    model = load_checkpoint(toy).model
    assert families.family_of(model.config) is TOY
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(toy, tmp_path / "hub", ConvertOptions())
    convert(tmp_path / "hub", tmp_path / "back", ConvertOptions("original"))
    assert (tmp_path / "back" / "eye" / "model.safetensors").is_file()
    for folder in (tmp_path / "hub", tmp_path / "back"):
        again = load_checkpoint(folder).model
        assert families.family_of(again.config) is TOY
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    attach(model, 4)
    freeze_all_but(model, STAGES["pretrain"])
    optimizer = torch.optim.SGD(p for p in model.parameters() if p.requires_grad)
    image, length = families.get_image_token_id(model.config), families.count_image_tokens(model.config)
    ids = torch.tensor([[1, *[image] * length, 9]])
    for _ in range(2):
        model(input_ids=ids, labels=ids.clamp_max(20), pixel_values=torch.ones(1, 3, 32, 32)).loss.backward()
        optimizer.step()
    after = model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved and {TOY.part_of(name) for name in moved} == {"projector"}
