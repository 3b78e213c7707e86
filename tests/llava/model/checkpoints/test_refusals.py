"""Promises of refusal: what cannot be loaded is named, with what is allowed and what to do, before a model is made."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

from layouts import (
    Parts,
    original_weights,
    save,
    write_hub,
    write_original,
    write_original_lora,
    write_projector_only,
    write_shards,
)
from llava.model.builder import load_checkpoint


@pytest.fixture
def folder(parts: Parts, tmp_path: Path) -> Path:
    """A whole checkpoint of the original layout, to be spoilt."""
    write_original(parts, tmp_path / "foo", "llava", "bin", 1, True)
    return tmp_path / "foo"


def change_config(folder: Path, **values: object) -> None:
    """Set keys of ``config.json``; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


OTHER_MODELS: dict[str, tuple[dict, str]] = {
    "LLaVA-NeXT, original": (
        {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"},
        "LLaVA-NeXT .*LlavaNextForConditionalGeneration",
    ),
    "LLaVA-HR": ({"is_multipath_encoder": True}, "LLaVA-HR, which has two vision towers"),
    "VILA-1.5": ({"llm_cfg": "llm", "vision_tower_cfg": "vision_tower"}, "VILA-1.5 or NVILA"),
    "another decoder": ({"model_type": "llava_mpt"}, "type llava_mpt in the original layout; llava, llava_llama"),
    "another projector": ({"mm_projector_type": "linear"}, "Projector type linear is not available, mlp2x_gelu is"),
    "another feature": ({"mm_vision_select_feature": "cls"}, "Vision feature cls is unknown; patch and cls_patch"),
    "a layer too deep": ({"mm_vision_select_layer": -9}, "Layer -9 is not in .*, which has 3"),
    "no size": ({"hidden_size": None}, "config.json of .*foo lacks hidden_size"),
    "no vision tower": ({"mm_vision_tower": None}, "without text_config and mm_vision_tower"),
}


@pytest.mark.parametrize("name", list(OTHER_MODELS))
def test_another_model_is_refused_by_what_its_configuration_says(folder: Path, name: str) -> None:
    values, message = OTHER_MODELS[name]
    change_config(folder, **values)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_llava_next_in_transformers_layout_is_refused(tmp_path: Path) -> None:
    LlavaNextConfig(text_config=LlamaConfig(), vision_config=CLIPVisionConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of type llava_next; a LLaVA"):
        load_checkpoint(tmp_path)


def _drop(weights: dict) -> None:
    del weights["model.layers.2.mlp.up_proj.weight"], weights["model.mm_projector.2.bias"]


def _add(weights: dict) -> None:
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    weights["model.layers.0.mlp.up_proj.bias"] = torch.zeros(1)


def _add_foreign(weights: dict) -> None:
    weights["model.image_newline"] = torch.zeros(1)
    weights["vision_resampler.weight"] = torch.zeros(1)


def _cut(weights: dict) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()


WRONG_WEIGHTS: dict[str, tuple[Callable[[dict], None], str]] = {
    "missing": (
        _drop,
        r"missing \[language_model.model.layers.2.mlp.up_proj.weight, multi_modal_projector.linear_2.bias\], "
        r"unexpected \[\], wrong shape \[\]",
    ),
    "unexpected": (
        _add,
        r"unexpected \[language_model.model.layers.0.mlp.up_proj.bias, language_model.model.layers.7.mlp.up_proj.we",
    ),
    "foreign": (_add_foreign, r"unexpected weights \[model.image_newline, vision_resampler.weight\]"),
    "misshapen": (_cut, r"wrong shape \[language_model.model.norm.weight \(5,\), not \(32,\)\]"),
}


@pytest.mark.parametrize("name", list(WRONG_WEIGHTS))
def test_wrong_weights_are_listed(parts: Parts, folder: Path, name: str) -> None:
    spoil, message = WRONG_WEIGHTS[name]
    weights = original_weights(parts, True)
    spoil(weights)
    save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_one_weight_under_two_names_is_named(parts: Parts, folder: Path) -> None:
    weights = original_weights(parts, True)
    weights["language_model.lm_head.weight"] = weights["lm_head.weight"].clone()
    save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\[language_model.lm_head.weight, lm_head.weight\] twice under two names"):
        load_checkpoint(folder)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read as weights .*a pickle of plain tensors"):
        load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists(), "the same file does run where it is trusted"


@pytest.mark.parametrize("content", [b"", b"not a file of weights", pickle.dumps({"a": 1}, protocol=2)])
def test_a_damaged_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin (cannot be read as weights|holds more than named tensors)"
    ):
        load_checkpoint(folder)


def test_a_shard_that_is_not_there_is_named(parts: Parts, folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    write_shards(original_weights(parts, True), folder, "safetensors", 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00003.safetensors, which its index names"):
        load_checkpoint(folder)


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="holds no weights and names no base; whole weights are needed"):
        load_checkpoint(folder)


def test_a_projector_needs_a_base_and_a_whole_model_none(parts: Parts, folder: Path, tmp_path: Path) -> None:
    write_projector_only(parts, tmp_path / "projector")
    with pytest.raises(ValueError, match="holds a projector and names no base.*model_base"):
        load_checkpoint(tmp_path / "projector")
    with pytest.raises(ValueError, match="has no part in it"):
        load_checkpoint(folder, model_base=str(parts.vicuna))
    with pytest.raises(ValueError, match="is a language model .*a LLaVA is needed"):
        load_checkpoint(parts.vicuna)


def test_updates_of_another_model_are_listed(parts: Parts, tmp_path: Path) -> None:
    write_original_lora(parts, tmp_path / "lora")
    factors = torch.load(tmp_path / "lora" / "adapter_model.bin", weights_only=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save(factors | {name: torch.zeros(2, 7)}, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight \(32, 7\), not \(32, 32\).*model_base"):
        load_checkpoint(tmp_path / "lora")
    del factors[name]
    save(factors, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"\[model.layers.0.self_attn.q_proj.weight\] lack a half"):
        load_checkpoint(tmp_path / "lora")


@pytest.mark.parametrize("values", [{"peft_type": "LOHA"}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_updates_of_another_kind_are_refused(parts: Parts, tmp_path: Path, values: dict) -> None:
    write_original_lora(parts, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ValueError, match="plain LoRA with lora_alpha is read"):
        load_checkpoint(tmp_path / "lora")


def test_bases_that_rest_on_each_other_are_refused(parts: Parts, tmp_path: Path) -> None:
    for name, base in (("one", "../two"), ("two", "../one")):
        write_original_lora(parts, tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match="which rests on it; correct one of them"):
        load_checkpoint(tmp_path / "one")


def test_updates_beside_whole_weights_are_refused(parts: Parts, folder: Path) -> None:
    write_original_lora(parts, folder.with_name("lora"))
    for name in ("adapter_config.json", "adapter_model.bin"):
        (folder.with_name("lora") / name).rename(folder / name)
    with pytest.raises(ValueError, match="LoRA weights and the weights of a whole model; which of them is meant"):
        load_checkpoint(folder)


def test_a_hub_layout_without_image_processor_is_named(parts: Parts, tmp_path: Path) -> None:
    write_hub(parts, tmp_path / "foo")
    (tmp_path / "foo" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config.json; it says how images are resized"):
        load_checkpoint(tmp_path / "foo")


def test_a_missing_vision_tower_is_named(folder: Path) -> None:
    change_config(folder, mm_vision_tower=str(folder / "gone"))
    with pytest.raises(FileNotFoundError, match="Vision tower .*gone is no folder of a CLIP checkpoint"):
        load_checkpoint(folder)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_path_without_checkpoint_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "foo")
    with pytest.raises(FileNotFoundError, match=r"foo (is no folder|holds no config.json).* name "):
        load_checkpoint(tmp_path / "foo")
