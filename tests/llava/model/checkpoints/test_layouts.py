"""Promises of loading: a checkpoint of any layout gives the logits of transformers' own LLaVA with its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layouts import (
    Parts,
    original_weights,
    write_hub,
    write_lora,
    write_original,
    write_original_lora,
    write_projector_only,
)
from llava.model.builder import load_pretrained_model
from llava.model.llava_llama import LlavaLlamaForCausalLM
from parity import PROMPTS, largest_difference, our_logits, stock_logits

BOUND = 1e-5

Written = tuple[str | None, dict[str, Tensor]]
"""``model_base`` to load with, and weights that differ from those of the parts, under names of today's modules."""


def _original(model_type: str, suffix: str, num_shards: int, with_tower: bool) -> Callable[[Parts, Path], Written]:
    def write(parts: Parts, folder: Path) -> Written:
        write_original(parts, folder, model_type, suffix, num_shards, with_tower)
        return None, {}

    return write


def _hub(parts: Parts, folder: Path) -> Written:
    write_hub(parts, folder)
    return None, {}


def _modules(parts: Parts, folder: Path) -> Written:
    write_hub(parts, folder, rename=lambda weights: {name: name for name in weights})
    return None, {}


def _projector(parts: Parts, folder: Path) -> Written:
    write_projector_only(parts, folder)
    return str(parts.vicuna), {}


def _bare_projector(parts: Parts, folder: Path) -> Written:
    base = folder.with_name("the base")
    write_original(parts, base, "llava", "safetensors", 1, True)
    write_projector_only(parts, folder)
    (folder / "config.json").unlink()
    return str(base), {}


def _lora(parts: Parts, folder: Path) -> Written:
    return str(parts.vicuna), write_original_lora(parts, folder)


def _lora_that_names_its_base(parts: Parts, folder: Path) -> Written:
    return None, write_original_lora(parts, folder)


def _bare_lora(parts: Parts, folder: Path) -> Written:
    write_hub(parts, folder.with_name("the base"))
    return None, write_lora(parts, folder, "base_model.model.language_model.model.layers.", "../the base")


def _lora_of_a_whole_llava(parts: Parts, folder: Path) -> Written:
    write_original(parts, folder.with_name("the base"), "llava_llama", "bin", 2, False)
    updated = write_original_lora(parts, folder)
    (folder / "config.json").unlink()
    return str(folder.with_name("the base")), updated


LAYOUTS: dict[str, Callable[[Parts, Path], Written]] = {
    "transformers, names of the hub": _hub,
    "transformers, names of today's modules": _modules,
    "original, llava, .bin shards": _original("llava", "bin", 3, False),
    "original, llava, one .bin with tower": _original("llava", "bin", 1, True),
    "original, llava_llama, safetensors shards with tower": _original("llava_llama", "safetensors", 2, True),
    "original, llava_llama, one safetensors": _original("llava_llama", "safetensors", 1, False),
    "projector of a language model": _projector,
    "projector without configuration, of a LLaVA": _bare_projector,
    "LoRA of a language model, base given": _lora,
    "LoRA of a language model, base named": _lora_that_names_its_base,
    "LoRA of a LLaVA, base given": _lora_of_a_whole_llava,
    "LoRA without configuration, base named beside": _bare_lora,
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_logits_are_those_of_the_same_weights_in_transformers(parts: Parts, tmp_path: Path, layout: str) -> None:
    base, updated = LAYOUTS[layout](parts, tmp_path / "foo")  # a name that says nothing
    reference = copy.deepcopy(parts.reference)
    reference.load_state_dict(updated, strict=False)
    tokenizer, model, image_processor, length = load_pretrained_model(str(tmp_path / "foo"), base, "foo", device="cpu")
    assert isinstance(model, LlavaLlamaForCausalLM) and not model.training and length == 256
    for side in ("left", "right"):
        ours = our_logits(model, tokenizer, image_processor, side)
        stock = stock_logits(reference, tokenizer, image_processor, side)
        differences = largest_difference(ours, stock, parts.vocab_size)
        assert max(differences.values()) <= BOUND, (side, differences)
    if updated:
        dense = stock_logits(parts.reference, tokenizer, image_processor, "left")
        assert min(largest_difference(dense, ours, parts.vocab_size).values()) > 0.01, "the updates matter"


def test_the_prompts_tell_layouts_apart(parts: Parts, tmp_path: Path) -> None:
    """Padding to a square, the image and every part of the weights show in the logits that are compared."""
    write_original(parts, tmp_path / "foo", "llava", "bin", 1, True)
    tokenizer, model, image_processor, _ = load_pretrained_model(str(tmp_path / "foo"), device="cpu")
    expected = our_logits(model, tokenizer, image_processor, "left")
    model.config.image_aspect_ratio = "square"
    found = largest_difference(our_logits(model, tokenizer, image_processor, "left"), expected, parts.vocab_size)
    assert {name for name, difference in found.items() if difference > 0.01} == {*PROMPTS} - {
        "a square image",
        "text only",
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_layernorm" in name or "encoder.layers.2" in name:
                continue  # behind the layer that features are taken from
            kept = parameter.clone()
            parameter.add_(torch.linspace(0, 1, parameter.numel()).view_as(parameter))
            changed = our_logits(model, tokenizer, image_processor, "left")
            assert max(largest_difference(changed, expected, parts.vocab_size).values()) > 10 * BOUND, name
            parameter.copy_(kept)


def test_half_precision_is_given_where_it_is_asked_for(parts: Parts, tmp_path: Path) -> None:
    write_original(parts, tmp_path / "foo", "llava", "bin", 1, False)
    _, model, *_ = load_pretrained_model(str(tmp_path / "foo"), device="cpu", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    name = "model.layers.1.mlp.up_proj.weight"
    expected = original_weights(parts, False)[name].to(torch.bfloat16)
    assert torch.equal(model.state_dict()["model.language_model.layers.1.mlp.up_proj.weight"], expected)
