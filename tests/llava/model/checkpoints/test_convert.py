"""Promises of conversion: logits stay, round trips change nothing, and a folder appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from layouts import Parts, original_weights, write_hub, write_original, write_original_lora, write_projector_only
from llava.model.builder import load_checkpoint, load_pretrained_model
from llava.model.checkpoints import convert as conversion
from llava.model.checkpoints.convert import ConvertOptions, convert
from parity import largest_difference, our_logits, stock_logits


def logits(folder: Path, base: str | None = None) -> dict[str, Tensor]:
    """Logits of the prompts."""
    tokenizer, model, image_processor, _ = load_pretrained_model(str(folder), base, device="cpu")
    return our_logits(model, tokenizer, image_processor, "left")


def stored(folder: Path) -> dict[str, Tensor]:
    """Name in the files -> tensor."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether names and bits agree."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_original_to_transformers_is_what_stock_transformers_reads(parts: Parts, tmp_path: Path) -> None:
    write_original(parts, tmp_path / "foo", "llava", "bin", 2, False)
    done = convert(tmp_path / "foo", tmp_path / "hub", ConvertOptions())
    assert (done.num_files, done.num_merged, done.router) == (1, 0, None)
    assert not list((tmp_path / "hub").glob("*.bin"))
    stock, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    _, _, image_processor, _ = load_pretrained_model(str(tmp_path / "foo"), device="cpu")
    expected = stock_logits(parts.reference, tokenizer, image_processor, "left")
    for converted in (stock_logits(stock.eval(), tokenizer, image_processor, "left"), logits(tmp_path / "hub")):
        assert max(largest_difference(converted, expected, parts.vocab_size).values()) <= 1e-5


def test_original_to_transformers_and_back_is_bit_for_bit(parts: Parts, tmp_path: Path) -> None:
    write_original(parts, tmp_path / "foo", "llava", "bin", 2, True)
    convert(tmp_path / "foo", tmp_path / "hub", ConvertOptions())
    done = convert(tmp_path / "hub", tmp_path / "back", ConvertOptions("original"))
    assert same(stored(tmp_path / "back"), original_weights(parts, True)) and done.vocab_size == parts.vocab_size
    before = json.loads((tmp_path / "foo" / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert after["model_type"] == "llava_llama" and after["architectures"] == ["LlavaLlamaForCausalLM"]
    same_keys = [key for key in before if key.startswith("mm_") or key in ("vocab_size", "rope_theta", "hidden_size")]
    assert {key: after[key] for key in same_keys} == {key: before[key] for key in same_keys}
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == parts.sentencepiece_model
    assert not (tmp_path / "back" / "tokenizer.json").exists(), "the original code reads tokenizer.model"
    assert max(largest_difference(logits(tmp_path / "back"), logits(tmp_path / "foo"), parts.vocab_size).values()) == 0


def test_transformers_to_original_and_back_keeps_what_text_can_say(parts: Parts, tmp_path: Path) -> None:
    write_hub(parts, tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "foo", ConvertOptions("original", vision_tower=str(parts.tower)))
    assert same(stored(tmp_path / "foo"), original_weights(parts, True))
    convert(tmp_path / "foo", tmp_path / "again", ConvertOptions())
    before, after = stored(tmp_path / "hub"), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor[: parts.vocab_size], after[name][: min(parts.vocab_size, len(tensor))]), name
    found = largest_difference(logits(tmp_path / "again"), logits(tmp_path / "hub"), parts.vocab_size)
    assert max(found.values()) == 0


def test_updates_are_merged_and_a_projector_joined(parts: Parts, tmp_path: Path) -> None:
    write_original_lora(parts, tmp_path / "lora")
    for layout in ("transformers", "original"):
        done = convert(tmp_path / "lora", tmp_path / layout, ConvertOptions(layout), str(parts.vicuna))
        assert done.num_merged == 4 and not (tmp_path / layout / "adapter_config.json").exists()
        found = largest_difference(logits(tmp_path / layout), logits(tmp_path / "lora"), parts.vocab_size)
        assert max(found.values()) == 0
    write_projector_only(parts, tmp_path / "projector")
    convert(tmp_path / "projector", tmp_path / "whole", ConvertOptions("original"), str(parts.vicuna))
    assert same(stored(tmp_path / "whole"), original_weights(parts, True))


def test_weights_are_cast_and_split_as_asked(parts: Parts, tmp_path: Path) -> None:
    write_original(parts, tmp_path / "foo", "llava", "bin", 1, False)
    done = convert(tmp_path / "foo", tmp_path / "small", ConvertOptions(dtype="bfloat16", max_shard_size=20_000))
    files = sorted((tmp_path / "small").glob("model-*.safetensors"))
    assert len(files) == done.num_files > 3
    largest = 448 * 32 * 2
    assert all(file.stat().st_size < max(20_000, largest) + 8_000 for file in files)
    tensors = stored(tmp_path / "small")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.nbytes for tensor in tensors.values()) == done.num_bytes
    expected = parts.weights["model.language_model.layers.0.mlp.up_proj.weight"].to(torch.bfloat16)
    assert torch.equal(tensors["language_model.model.layers.0.mlp.up_proj.weight"], expected)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "small", dtype="auto")
    assert stock.dtype == torch.bfloat16


def test_a_tokenizer_without_sentencepiece_goes_along(parts: Parts, tmp_path: Path) -> None:
    write_hub(parts, tmp_path / "hub")
    assert not (tmp_path / "hub" / "tokenizer.model").exists()
    convert(tmp_path / "hub", tmp_path / "foo", ConvertOptions("original", vision_tower=str(parts.tower)))
    ours, again = (load_checkpoint(tmp_path / name).tokenizer for name in ("hub", "foo"))
    assert ours("USER: Which digit?\nASSISTANT:").input_ids == again("USER: Which digit?\nASSISTANT:").input_ids


def test_nothing_is_overwritten(parts: Parts, tmp_path: Path) -> None:
    write_original(parts, tmp_path / "foo", "llava", "bin", 1, True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(FileExistsError, match="out exists, and nothing is overwritten; name a new folder"):
        convert(tmp_path / "foo", tmp_path / "out", ConvertOptions())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_failure_leaves_nothing_behind(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_original(parts, tmp_path / "foo", "llava", "bin", 1, True)
    before = sorted(tmp_path.iterdir())
    write = conversion.write_weights

    def damage(forms, tensor, folder, *more):
        number = write(forms, tensor, folder, *more)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1  # as a bad disk would
        (folder / "model.safetensors").write_bytes(content)
        return number

    monkeypatch.setattr(conversion, "write_weights", damage)
    with pytest.raises(RuntimeError, match="Read back, 1 of 98 weights differ"):
        convert(tmp_path / "foo", tmp_path / "out", ConvertOptions())
    assert sorted(tmp_path.iterdir()) == before


def test_what_the_original_layout_cannot_say_is_refused(parts: Parts, tmp_path: Path) -> None:
    write_hub(parts, tmp_path / "hub")
    with pytest.raises(ValueError, match="this checkpoint names none; name it with --vision-tower"):
        convert(tmp_path / "hub", tmp_path / "out", ConvertOptions("original"))
    shutil.copytree(parts.tower, tmp_path / "tower")
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 0.5
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="differs from the one in the checkpoint: layer_norm_eps 0.5, not"):
        convert(tmp_path / "hub", tmp_path / "out", ConvertOptions("original", vision_tower=str(tmp_path / "tower")))
    file = tmp_path / "hub" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"projector_hidden_act": "relu"}))
    with pytest.raises(ValueError, match="cannot say {'projector_hidden_act': 'relu'}"):
        convert(tmp_path / "hub", tmp_path / "out", ConvertOptions("original", vision_tower=str(parts.tower)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "hf"}, "Layout hf is unknown; transformers and original"),
        ({"dtype": "int8"}, "Data type int8 is unknown; float32"),
        ({"vision_tower": "x"}, "describes its tower itself; leave it out"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvertOptions(**options)


def test_a_full_disk_is_found_before_anything_is_written(parts: Parts, tmp_path: Path, monkeypatch) -> None:
    write_original(parts, tmp_path / "foo", "llava", "bin", 1, True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1, 1))
    with pytest.raises(OSError, match=r"has 0.0 GiB free, .* GiB are needed; make room"):
        convert(tmp_path / "foo", tmp_path / "out", ConvertOptions())
