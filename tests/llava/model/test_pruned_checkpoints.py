"""Token pruning that a user reaches: by the loader, and by a checkpoint that was saved with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_checkpoint, load_pretrained_model
from llava.model.families import count_image_tokens
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.token_pruning import has_token_pruning, set_token_pruning


@pytest.fixture
def folder(reading_llava, bpe_tokenizer, image_processor, tmp_path: Path) -> Path:
    """A dense checkpoint on disk; 16 image tokens per image."""
    LlavaLlamaForCausalLM.adopt(reading_llava, image_processor).save_pretrained(tmp_path / "dense")
    for part in (bpe_tokenizer, image_processor):
        part.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@torch.no_grad()
def answer(model, **options) -> torch.Tensor:
    """Logits of a prompt in LLaVA's convention, one marker for its image."""
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model(input_ids=torch.tensor([[1, IMAGE_TOKEN_INDEX, 20, 21, 22]]), images=image, **options).logits


def test_the_loader_reads_fewer_tokens_of_each_image(folder: Path) -> None:
    _, whole, _, _ = load_pretrained_model(str(folder), device="cpu")
    _, model, _, _ = load_pretrained_model(str(folder), device="cpu", visual_tokens=5)
    assert count_image_tokens(model.config) == 5 and count_image_tokens(whole.config) == 16
    assert answer(whole).shape[1] == 16 + 4 and answer(model).shape[1] == 5 + 4


def test_a_checkpoint_that_was_saved_pruned_prunes_when_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    set_token_pruning(checkpoint.model, 6, "even")
    expected = answer(checkpoint.model.eval())
    checkpoint.model.save_pretrained(tmp_path / "pruned")
    for part in (checkpoint.tokenizer, checkpoint.image_processor):
        part.save_pretrained(tmp_path / "pruned")
    loaded = load_checkpoint(tmp_path / "pruned").model.eval()
    assert has_token_pruning(loaded) and loaded.config.token_pruner == "even"
    assert torch.equal(answer(loaded), expected)


def test_more_tokens_than_there_are_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="num_kept is 17; an image keeps 1 to 16 tokens"):
        load_pretrained_model(str(folder), device="cpu", visual_tokens=17)
