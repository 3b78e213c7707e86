"""A checkpoint as RoE's own training code saves it, of the weights that its published code was run with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from golden_roe import arrays, golden
from layouts import Parts, original_config, original_weights

VOCAB_SIZE = 96


def write_roe(parts: Parts, folder: Path) -> None:
    """Write the golden weights, with vision tower and projector of the parts, in the layout of RoE's checkpoints."""
    folder.mkdir()
    weights = {key[2:]: golden(key) for key in arrays("roe_golden") if key.startswith("w/")}
    vision = {name: t for name, t in original_weights(parts, True).items() if "mm_" in name or "vision" in name}
    torch.save(weights | vision, folder / "pytorch_model.bin")
    sizes = {"vocab_size": VOCAB_SIZE, "num_key_value_heads": 4, "rope_theta": 10000.0}
    config = original_config(parts) | sizes | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.save_pretrained(folder)
