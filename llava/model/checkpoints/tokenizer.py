"""The tokenizer of a checkpoint: read, also from a sentencepiece model alone, written, and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.model.checkpoints.weights import find_file

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILES = ("tokenizer.json", SENTENCEPIECE_FILE)
"""Files that hold a tokenizer; the first that is there is read."""

SENTENCEPIECE_FILES = (SENTENCEPIECE_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files that describe a tokenizer as the original code reads it."""

SPACE = "▁"
"""What sentencepiece writes for a space."""

PROBES = ("Ask  twice,\nthen\tadd 1234 ", "  Éclair ﬁnds Ａ１ 日本 😀", "x")
"""Texts that a tokenizer is compared with sentencepiece on: spaces, lines, digits, what NFKC would change, bytes."""


def read_tokenizer(path: str | Path) -> Any:
    """Read a tokenizer, with ``<image>`` in its vocabulary; ids of plain text are those of the checkpoint's own files.

    Raises:
        FileNotFoundError: If the checkpoint has no tokenizer.
        ValueError: If its sentencepiece model is not one of Llama's kind.
    """
    if find_file(path, *TOKENIZER_FILES) is None:
        raise FileNotFoundError(
            f"{path} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); one is needed. Copy it from the base model."
        )
    if find_file(path, "tokenizer.json") is None:
        return _from_sentencepiece(path)
    # not AutoTokenizer: for some classes it takes only the vocabulary from the file, and cuts text by its own rules
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if DEFAULT_IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, layout: str) -> None:
    """Write a tokenizer; the original code can read it if the checkpoint came with a sentencepiece model.

    Args:
        tokenizer: As ``read_tokenizer`` gave it.
        folder, layout: Folder of a checkpoint; "transformers" or "original".
    """
    path = tokenizer.name_or_path
    files = {name: find_file(path, name) for name in SENTENCEPIECE_FILES} if path else {}
    model = files.get(SENTENCEPIECE_FILE)
    if layout == "original" and model is not None:
        for name, file in files.items():
            if file is not None:
                shutil.copyfile(file, folder / name)
        if has_same_ids(tokenizer, read_tokenizer(folder)):
            return
        # the sentencepiece files alone lose something, such as a token that was added later
        for name in files:
            (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    if model is not None:
        shutil.copyfile(model, folder / SENTENCEPIECE_FILE)


def has_same_ids(one: Any, other: Any) -> bool:
    """Whether two tokenizers cut texts into the same ids."""
    return all(one(text).input_ids == other(text).input_ids for text in (*PROBES, "a<image>\nb"))


def _from_sentencepiece(path: str | Path) -> PreTrainedTokenizerFast:
    """Build a tokenizer that cuts text exactly as sentencepiece does.

    ``LlamaTokenizer`` alone does not: it drops a space at the start of a text, and the beginning-of-sequence token of a
    folder without ``tokenizer_config.json``. Saving keeps a ``PreTrainedTokenizerFast`` as it is, but not a
    ``LlamaTokenizer``, which is built anew from its vocabulary.
    """
    file = find_file(path, "tokenizer_config.json")
    settings = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    ends = {"add_bos_token": settings.get("add_bos_token", True), "add_eos_token": settings.get("add_eos_token", False)}
    llama = LlamaTokenizer.from_pretrained(path, **ends)
    _prepend_spaces(llama.backend_tokenizer, every_segment=settings.get("legacy", True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=llama.backend_tokenizer,
        name_or_path=str(path),
        bos_token=llama.bos_token,
        eos_token=llama.eos_token,
        unk_token=llama.unk_token,
        pad_token=llama.pad_token,
        padding_side=settings.get("padding_side", "right"),  # as slow tokenizers had it, and LLaVA trained
        model_max_length=llama.model_max_length,
        extra_special_tokens={"image_token": DEFAULT_IMAGE_TOKEN},
    )
    model_file = str(find_file(path, SENTENCEPIECE_FILE))
    reference = SentencePieceProcessor(model_file=model_file)
    for text in PROBES:
        ours, theirs = tokenizer(text, add_special_tokens=False).input_ids, reference.encode(text)
        if ours != theirs:
            raise ValueError(
                f"{model_file} cuts {text!r} into ids {theirs[:8]}, a tokenizer of Llama's kind into {ours[:8]}; only "
                "byte-fallback BPE without text normalisation is read. Add the tokenizer.json of this model."
            )
    return tokenizer


def _prepend_spaces(backend: Tokenizer, every_segment: bool) -> None:
    """Put a space in front of the text, even if it starts with one, or (``legacy``) of every segment between tokens."""
    if every_segment:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        backend.pre_tokenizer = None
        return
    backend.normalizer = normalizers.Replace(" ", SPACE)
    # Metaspace prepends only to a text that does not start with its own sign: the first one's sign is a plain
    # space, of which none are left, and the second turns it into sentencepiece's
    prepend = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
    write = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([prepend, write])
