"""Promises of what a stage starts from: stored weights as they are, in whatever layout, and a drawn projector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layouts import Parts, build_parts, original_names, write_original, write_projector_only
from llava.model.builder import load_checkpoint
from llava.model.checkpoints.reading import read_config_and_tokenizer
from llava.model.families import VisionSettings
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.train.arguments import ModelArguments
from llava.train.load_model import load_model
from roe_checkpoint import write_roe


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Random weights, folders with a vision tower and a language model."""
    return build_parts(tmp_path_factory.mktemp("parts"))


def start(model: Path, seed: int = 0, **flags: object) -> LlavaLlamaForCausalLM:
    """The model that a stage starts from."""
    checkpoint = load_model(ModelArguments(model_name_or_path=str(model), **flags), torch.float32, seed)
    assert isinstance(checkpoint.model, LlavaLlamaForCausalLM) and checkpoint.weights_path == str(model)
    return checkpoint.model


def differing(model: LlavaLlamaForCausalLM, parts: Parts) -> set[str]:
    """Names, in the original repository, of the weights that are not those of the parts."""
    state, names = model.state_dict(), original_names(parts.weights)
    return {
        names[name]
        for name, tensor in parts.weights.items()
        if not torch.equal(state[name][: len(tensor)] if tensor.dim() == 2 else state[name], tensor)
    }


def test_a_stage_starts_from_the_original_layout(parts: Parts, tmp_path: Path) -> None:
    write_original(parts, tmp_path / "foo", "llava", "bin", 2, False)
    assert not differing(start(tmp_path / "foo"), parts)


def test_a_language_model_gets_a_vision_tower_and_a_projector_drawn_by_the_seed(parts: Parts) -> None:
    one, same, other = (start(parts.vicuna, seed, vision_tower=str(parts.tower)) for seed in (0, 0, 1))
    projector = {f"model.mm_projector.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")}
    weights = {name for name in projector if name.endswith("weight")}
    assert weights <= differing(one, parts) <= projector
    weight = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(one.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])
    rows = one.state_dict()["lm_head.weight"]
    mean = parts.weights["lm_head.weight"].mean(dim=0)
    torch.testing.assert_close(rows[parts.vocab_size :], mean.expand(len(rows) - parts.vocab_size, -1))


def test_a_pretrained_projector_takes_its_place(parts: Parts, tmp_path: Path) -> None:
    write_projector_only(parts, tmp_path / "pretrain")
    flags = {"vision_tower": str(parts.tower), "pretrain_mm_mlp_adapter": str(tmp_path / "pretrain/mm_projector.bin")}
    assert not differing(start(parts.vicuna, **flags), parts)


@pytest.mark.parametrize("layout", ["original", "language model"])
def test_the_text_side_is_that_of_the_model_without_its_weights(parts: Parts, tmp_path: Path, layout: str) -> None:
    if layout == "original":
        write_original(parts, tmp_path / "foo", "llava", "bin", 1, True)
        config, tokenizer = read_config_and_tokenizer(tmp_path / "foo")
        (tmp_path / "foo" / "pytorch_model.bin").rename(tmp_path / "weights")
        with pytest.raises(ValueError, match="holds no weights"):
            read_config_and_tokenizer(tmp_path / "foo")
        (tmp_path / "weights").rename(tmp_path / "foo" / "pytorch_model.bin")
        model = load_checkpoint(tmp_path / "foo").model
    else:
        config, tokenizer = read_config_and_tokenizer(parts.vicuna, VisionSettings(str(parts.tower)))
        model = start(parts.vicuna, vision_tower=str(parts.tower))
        with pytest.raises(ValueError, match="a CLIP checkpoint must be named as its vision tower"):
            read_config_and_tokenizer(parts.vicuna)
    assert config.text_config.to_dict() | {"dtype": 0} == model.config.text_config.to_dict() | {"dtype": 0}
    assert config.image_token_id == model.config.image_token_id == parts.vocab_size
    assert tokenizer("Read it.").input_ids[0] == 1


def test_a_checkpoint_of_roes_own_code_is_converted_first(parts: Parts, tmp_path: Path) -> None:
    write_roe(parts, tmp_path / "roe")
    with pytest.raises(ValueError, match="trained by RoE's own code; .* Convert it first: fuzzyroe convert"):
        start(tmp_path / "roe")
