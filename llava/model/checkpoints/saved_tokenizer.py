"""The tokenizer of a converted checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llava.model.checkpoints.tokenizer import PROBES, read_tokenizer
from llava.model.checkpoints.weight_files import find_file

SENTENCEPIECE_FILE = "tokenizer.model"
SENTENCEPIECE_FILES = (
    SENTENCEPIECE_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that describe a tokenizer as the original code reads it."""


def original_vocab_size(config: Any, tokenizer: Any) -> int:
    """Number of token ids that a checkpoint has in the original layout, which has none for images.

    Args:
        config: Configuration in transformers' layout.
        tokenizer: Tokenizer with an image token.

    Returns:
        The image token's id if only special tokens, which serve transformers alone, have ids behind it; else all.
    """
    first = config.image_token_id
    behind = {token: number for token, number in tokenizer.get_vocab().items() if number >= first}
    if set(behind) <= set(tokenizer.get_added_vocab()):
        return first
    return config.text_config.vocab_size


def save_tokenizer(tokenizer: Any, folder: Path, layout: str) -> None:
    """Write a tokenizer; the original code can read it if the checkpoint came with a sentencepiece model.

    Args:
        tokenizer: As ``read_tokenizer`` gave it.
        folder: Folder of a checkpoint.
        layout: "transformers" or "original".
    """
    path = tokenizer.name_or_path
    found = {name: find_file(path, name) for name in SENTENCEPIECE_FILES} if path else {}
    model = found.get(SENTENCEPIECE_FILE)
    if layout == "original" and model is not None:
        for name, file in found.items():
            if file is not None:
                shutil.copyfile(file, folder / name)
        if _agree(tokenizer, read_tokenizer(folder)):
            return
        for name in found:
            (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    if model is not None:
        shutil.copyfile(model, folder / SENTENCEPIECE_FILE)


def compare_tokenizers(ours: Any, again: Any) -> None:
    """Raise RuntimeError if two tokenizers give different ids."""
    if not _agree(ours, again):
        raise RuntimeError(
            "Read back, the tokenizer gives other ids than the checkpoint's own; report this checkpoint."
        )


def _agree(one: Any, other: Any) -> bool:
    return all(one(text).input_ids == other(text).input_ids for text in (*PROBES, "a<image>\nb"))
