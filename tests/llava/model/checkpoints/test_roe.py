"""Promises of RoE's checkpoints: they load, and compute what the published code computed with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuzzyroe.attach import find_decoder, is_attached
from fuzzyroe.cache import kept_layers
from fuzzyroe.routers import LinearRouter
from golden_roe import ADAPTER_WIDTH, assert_close, golden, prompts
from layouts import Parts
from llava.model.builder import load_checkpoint, load_pretrained_model
from llava.model.checkpoints.convert import ConvertOptions, convert
from llava.model.checkpoints.routing import ROUTING_FILE
from roe_checkpoint import VOCAB_SIZE, write_roe

PROMPTS = ("eval_b1_0", "eval_b1_1", "eval_b1_2")


@pytest.fixture(scope="module")
def folder(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of RoE's, ``roe``, and what it was converted to, ``hub`` and ``original``."""
    folder = tmp_path_factory.mktemp("roe")
    write_roe(parts, folder / "roe")
    for layout, name in (("transformers", "hub"), ("original", "original")):
        done = convert(folder / "roe", folder / name, ConvertOptions(layout))
        assert done.router == "linear" and (folder / name / ROUTING_FILE).exists()
    return folder


@torch.no_grad()
@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("name", ["roe", "hub", "original"])
def test_a_prompt_takes_the_published_path_to_the_published_logits(folder: Path, name: str, case: str) -> None:
    checkpoint = load_checkpoint(folder / name)
    assert is_attached(checkpoint.model) and checkpoint.routing.adapter_width == ADAPTER_WIDTH
    assert isinstance(find_decoder(checkpoint.model).router, LinearRouter)
    inputs, state = prompts(checkpoint.model, case)
    output = checkpoint.model(**inputs, routing=state, use_cache=True)
    assert torch.equal(state.kept_layers().T, golden(f"{case}/execute"))
    assert_close(output.logits[..., :VOCAB_SIZE], golden(f"{case}/prefill_logits")[:, 2:], "logits")


@torch.no_grad()
def test_an_imported_checkpoint_routes_images_and_rows_on_their_own(folder: Path) -> None:
    tokenizer, model, image_processor, _ = load_pretrained_model(str(folder / "roe"), device="cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE, (6, 9), generator=generator)
    ids[:, 2] = -200
    images = torch.randn(6, 3, 32, 32, generator=generator)
    together = model(ids, images=images, use_cache=True)
    kept = kept_layers(together.past_key_values, 6)
    assert not kept.all() and kept.any()
    for row in range(6):
        alone = model(ids[row : row + 1], images=images[row : row + 1], use_cache=True)
        assert torch.equal(kept_layers(alone.past_key_values, 1)[0], kept[row])
        assert_close(together.logits[row : row + 1], alone.logits, f"row {row}")


def test_a_tensor_of_roe_that_is_not_known_is_named(parts: Parts, tmp_path: Path) -> None:
    write_roe(parts, tmp_path / "roe")
    weights = torch.load(tmp_path / "roe" / "pytorch_model.bin", weights_only=True)
    weights["model.layers.1.adapter_MHA.conv_C.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "roe" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"not known: \[model.layers.1.adapter_MHA.conv_C.weight\]; adapters"):
        load_checkpoint(tmp_path / "roe")
    del weights["model.layers.1.adapter_MHA.conv_C.weight"], weights["model.layers.2.adapter_MHA.conv_A.weight"]
    torch.save(weights, tmp_path / "roe" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing \['layers.2.adapter.down.weight'\]"):
        load_checkpoint(tmp_path / "roe")
