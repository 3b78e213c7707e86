"""Promises of loading: what a stage saved is loaded bit for bit, and what cannot be loaded is named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder, is_attached
from fuzzyroe.budget import allocate
from fuzzyroe.routers import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from llava.model import builder
from llava.model.builder import WHOLE_MODULES, Checkpoint, load_checkpoint, load_pretrained_model
from llava.model.checkpoints.routing import ROUTING_FILE
from llava.model.llava_llama import attach_routing
from llava.train.arguments import LlavaTrainingArguments
from llava.train.checkpointing import save_stage
from llava.train.stages import STAGES


def save(checkpoint: Checkpoint, stage: str, output: Path) -> Path:
    """Write a checkpoint as a stage does, in one process."""
    trainer = SimpleNamespace(
        model=checkpoint.model,
        args=LlavaTrainingArguments(output_dir=str(output.with_name(output.name + ".partial")), use_cpu=True),
        accelerator=SimpleNamespace(wait_for_everyone=lambda: None),
    )
    save_stage(trainer, checkpoint, STAGES[stage], output, {"stage": stage})
    return output


@pytest.fixture
def dense(reading_llava, bpe_tokenizer, image_processor, tmp_path: Path) -> Checkpoint:
    """A dense checkpoint, written to ``base``."""
    checkpoint = Checkpoint(reading_llava, bpe_tokenizer, image_processor, "memory", str(tmp_path / "base"), None)
    save(checkpoint, "dense", tmp_path / "base")
    return checkpoint


@pytest.fixture
def routed(dense: Checkpoint) -> Checkpoint:
    """The same, routed at a skip rate of 0.4 by a router whose every number differs from a new one's."""
    router = FuzzyRouter(load_rule_base("default").interpolate(), 4)
    router.feature_high.copy_(torch.tensor([0.9, 0.9, 0.6]))
    losses = np.random.default_rng(0).exponential(size=(80, 4)).cumsum(axis=1)
    losses *= np.linspace(1, 6, 80)[:, None]  # a higher score, a larger loss
    router.set_budget_table(allocate(losses, (np.arange(80) + 0.5) / 80, [2, 1, 3], 4))
    router.set_skip_rate(0.4)
    attach_routing(dense.model, router, 4, "xavier")
    return dense


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, image_prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = image_prompts["input_ids"].masked_fill(image_prompts["input_ids"] == 95, 4)
    return model(**{**image_prompts, "input_ids": ids}).logits


@pytest.mark.parametrize(("stage", "has_backbone"), [("finetune", True), ("adapter", False)])
def test_a_routed_checkpoint_is_loaded_bit_for_bit(
    routed: Checkpoint, image_prompts: dict, tmp_path: Path, stage: str, has_backbone: bool
) -> None:
    expected = logits(routed.model, image_prompts)
    folder = save(routed, stage, tmp_path / "routed")
    assert bool(list(folder.glob("model*.safetensors"))) == has_backbone
    loaded = load_checkpoint(folder)
    assert torch.equal(logits(loaded.model, image_prompts), expected)
    assert loaded.routing.stage == stage and loaded.routing.adapter_width == 4
    assert loaded.weights_path == str(tmp_path / ("routed" if has_backbone else "base"))
    assert is_attached(loaded.model) and find_decoder(loaded.model).router.rule_base == load_rule_base(
        folder / "rule_base.yaml"
    )
    before = routed.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_loaded_checkpoint_with_routing_off_is_the_dense_one_bit_for_bit(
    routed: Checkpoint, image_prompts: dict, tmp_path: Path
) -> None:
    expected = logits(load_checkpoint(tmp_path / "base").model, image_prompts)
    for stage in ("finetune", "router"):
        loaded = load_checkpoint(save(routed, stage, tmp_path / stage)).model
        assert not torch.equal(logits(loaded, image_prompts), expected)
        set_skip_rate(loaded, None)
        assert torch.equal(logits(loaded, image_prompts), expected)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "finetune").eval()
    assert torch.equal(logits(stock, image_prompts), expected), "transformers alone loads the dense part"


def test_a_checkpoint_and_its_base_can_be_moved_together(
    routed: Checkpoint, image_prompts: dict, tmp_path: Path
) -> None:
    expected = logits(routed.model, image_prompts)
    save(routed, "router", tmp_path / "router")
    (tmp_path / "moved").mkdir()
    for name in ("base", "router"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    assert torch.equal(logits(load_checkpoint(tmp_path / "moved" / "router").model, image_prompts), expected)
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(FileNotFoundError, match="its base model is not at .*moved/router/../base"):
        load_checkpoint(tmp_path / "moved" / "router")


def test_half_precision_weights_leave_the_router_as_it_was(routed: Checkpoint, tmp_path: Path) -> None:
    folder = save(routed, "finetune", tmp_path / "routed")
    loaded = load_checkpoint(folder, torch.bfloat16).model
    assert loaded.dtype == torch.bfloat16
    before = find_decoder(routed.model).router.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in find_decoder(loaded).router.state_dict().items())


def test_load_pretrained_model_returns_what_lmms_eval_unpacks(routed: Checkpoint, tmp_path: Path) -> None:
    folder = str(save(routed, "finetune", tmp_path / "routed"))
    tokenizer, model, image_processor, context_length = load_pretrained_model(folder, None, "llava", device="cpu")
    assert tokenizer("USER: Which digit?").input_ids == routed.tokenizer("USER: Which digit?").input_ids
    assert image_processor.crop_size["height"] == 32 and context_length == 256
    assert not model.training and model.dtype == torch.float32
    assert find_decoder(model).router.target_skip_ratio == pytest.approx(0.4)
    _, model, *_ = load_pretrained_model(folder, device="cpu", skip_rate=0.2, torch_dtype=torch.bfloat16)
    assert find_decoder(model).router.target_skip_ratio == pytest.approx(0.2) and model.dtype == torch.bfloat16


def test_a_dense_checkpoint_has_no_routing(dense: Checkpoint, image_prompts: dict, tmp_path: Path) -> None:
    loaded = load_checkpoint(tmp_path / "base")
    assert loaded.routing is None and not is_attached(loaded.model)
    assert torch.equal(logits(loaded.model, image_prompts), logits(dense.model, image_prompts))
    with pytest.raises(ValueError, match="asked of a dense checkpoint"):
        load_pretrained_model(str(tmp_path / "base"), device="cpu", skip_rate=0.3)


@pytest.mark.parametrize("option", ["load_8bit", "load_4bit"])
def test_quantization_without_bitsandbytes_is_refused_before_anything_is_loaded(option: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ImportError, match=f"{option} was given but bitsandbytes is not installed; pip install"):
        load_pretrained_model("nowhere", **{option: True})


def test_what_is_quantized_is_the_decoder_and_nothing_else(tiny_llava: LlavaForConditionalGeneration) -> None:
    names = [name for name, module in tiny_llava.named_modules() if isinstance(module, torch.nn.Linear)]
    quantized = {name for name in names if should_convert_module(name, WHOLE_MODULES)}
    assert quantized == {name for name in names if name.startswith("model.language_model.layers.")}
    assert len(quantized) == 4 * 7 < len(names)


@pytest.mark.parametrize(
    ("device", "device_map"), [("cuda", "auto"), ("cuda:1", {"": "cuda:1"}), ("cpu", None), ("cpu:0", None)]
)
def test_the_model_is_put_on_the_device_that_is_named(
    device: str, device_map: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise InterruptedError(repr(options.get("device_map")))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(builder, "load_checkpoint", load)
    with pytest.raises(InterruptedError) as asked:
        load_pretrained_model("nowhere", device=device)
    assert str(asked.value) == repr(device_map)


def test_two_quantizations_are_refused() -> None:
    with pytest.raises(ValueError, match="both given"):
        load_pretrained_model("nowhere", load_8bit=True, load_4bit=True)


def test_a_base_that_has_no_part_in_a_checkpoint_is_refused(dense: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_base vicuna has no part in it"):
        load_pretrained_model(str(tmp_path / "base"), "vicuna")


def test_missing_or_foreign_routing_tensors_are_named(routed: Checkpoint, tmp_path: Path) -> None:
    folder = save(routed, "router", tmp_path / "router")
    tensors = load_file(folder / ROUTING_FILE)
    tensors["router.extra"] = tensors.pop("router.target_skip_ratio")
    save_file(tensors, folder / ROUTING_FILE)
    with pytest.raises(ValueError, match=r"missing \['router.target_skip_ratio'\], unexpected \['router.extra'\]"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["rule_base.yaml", ROUTING_FILE])
def test_a_missing_file_is_named(routed: Checkpoint, tmp_path: Path, name: str) -> None:
    folder = save(routed, "router", tmp_path / "router")
    (folder / name).unlink()
    with pytest.raises(OSError, match=name):
        load_checkpoint(folder)


def test_a_damaged_block_is_refused(routed: Checkpoint, tmp_path: Path) -> None:
    folder = save(routed, "router", tmp_path / "router")
    config = json.loads((folder / "config.json").read_text())
    config["fuzzyroe"]["adapter_width"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"wrong shape \['layers.0.adapter.down.weight \(4, 32\), not \(5, 32\)"):
        load_checkpoint(folder)
