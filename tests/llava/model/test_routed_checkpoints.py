"""Promises of checkpoints: every router and every skip unit is loaded as it was saved, and old blocks still load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder, find_decoder_layers, set_router
from fuzzyroe.cache import kept_layers
from fuzzyroe.prompt_hash import prompt_hashes
from fuzzyroe.routed_layer import SKIP_UNITS
from fuzzyroe.routers import KeepAllRouter, OracleRouter, RandomRouter, StaticRouter
from fuzzyroe.routing_state import RoutingState
from llava.model.builder import Checkpoint, load_checkpoint
from llava.model.checkpoints.routing import ROUTING_FILE
from llava.train.arguments import LlavaTrainingArguments
from llava.train.checkpointing import save_stage
from llava.train.stages import STAGES
from routed_llava import encode_questions, route


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
def prompts(bpe_tokenizer) -> dict[str, torch.Tensor]:
    """Three prompts, one without an image."""
    return encode_questions(bpe_tokenizer, ["<image>\nWhat?", "<image>\nRead every digit.", "Add two, please."])


@pytest.fixture
def dense(reading_llava, bpe_tokenizer, image_processor, tmp_path: Path) -> Checkpoint:
    """A dense checkpoint, written to ``base``."""
    checkpoint = Checkpoint(reading_llava, bpe_tokenizer, image_processor, "memory", str(tmp_path / "base"), None)
    save(checkpoint, "dense", tmp_path / "base")
    return checkpoint


@torch.no_grad()
def run(model, prompts: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and which layers each row ran."""
    output = model(**prompts, use_cache=True, **options)
    return output.logits, kept_layers(output.past_key_values, len(prompts["input_ids"]))


def known_prompts(model, prompts: dict) -> OracleRouter:
    """An oracle that knows the prompts."""
    embeddings = model.get_input_embeddings()(prompts["input_ids"])
    state = RoutingState.from_batch(
        {
            "input_ids": prompts["input_ids"],
            "attention_mask": prompts["attention_mask"],
            "pixel_values": prompts["pixel_values"],
        },
        4,
    )
    plans = torch.tensor([[[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0]]] * 3).bool()
    return OracleRouter.from_search(prompt_hashes(embeddings, state)[:, 0], plans, torch.rand(3, 3).cumsum(dim=1))


ROUTER_MAKERS = {
    "fuzzy": lambda model, prompts: find_decoder(model).router,
    "random": lambda model, prompts: RandomRouter(4, seed=3),
    "static": lambda model, prompts: StaticRouter(4, [3, 1], criterion="perplexity"),
    "oracle": known_prompts,
    "none": lambda model, prompts: KeepAllRouter(4),
}


@pytest.mark.parametrize("name", list(ROUTER_MAKERS))
@pytest.mark.parametrize("stage", ["adapter", "finetune"])
def test_a_router_is_loaded_as_it_was_saved(dense: Checkpoint, prompts: dict, tmp_path: Path, name, stage) -> None:
    model = route(dense.model)
    router = ROUTER_MAKERS[name](model, prompts)
    router.set_skip_rate(0.5 * router.max_skip_ratio)
    set_router(model, router)
    expected = run(model, prompts)
    loaded = load_checkpoint(save(dense, stage, tmp_path / "routed"))
    found = run(loaded.model, prompts)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert loaded.routing.router == name and found[1].all() == (name == "none")
    assert type(find_decoder(loaded.model).router) is type(router)
    set_skip_rate(loaded.model, 0.0)
    assert run(loaded.model, prompts)[1].all()
    assert (tmp_path / "routed" / "rule_base.yaml").exists() == (name == "fuzzy")


@pytest.mark.parametrize("unit", list(SKIP_UNITS))
def test_the_skip_unit_is_loaded_as_it_was_saved(dense: Checkpoint, prompts: dict, tmp_path: Path, unit) -> None:
    expected = run(route(dense.model, unit), prompts)
    loaded = load_checkpoint(save(dense, "adapter", tmp_path / "routed"))
    found = run(loaded.model, prompts)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and not found[1].all()
    assert loaded.routing.skip_unit == unit
    assert {layer.skip_unit for layer in find_decoder_layers(loaded.model)} == {unit}


def test_a_router_that_is_in_no_table_is_not_saved(dense: Checkpoint, tmp_path: Path) -> None:
    class Homemade(KeepAllRouter):
        pass

    set_router(route(dense.model), Homemade(4))
    with pytest.raises(KeyError, match="Homemade is none of the routers"):
        save(dense, "adapter", tmp_path / "routed")
    assert not (tmp_path / "routed").exists()


def test_tensors_of_a_router_are_under_names_of_its_own(dense: Checkpoint, prompts: dict, tmp_path: Path) -> None:
    model = route(dense.model)
    set_router(model, known_prompts(model, prompts))
    tensors = load_file(save(dense, "adapter", tmp_path / "routed") / ROUTING_FILE)
    assert {name for name in tensors if name.startswith("router.")} == {
        "router.known",
        "router.plans",
        "router.losses",
    }
