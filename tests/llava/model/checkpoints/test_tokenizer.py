"""Promises of tokenizers: text gets the ids that sentencepiece gives it, whatever files a checkpoint has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer

from layouts import Parts, train_sentencepiece, write_original
from llava.mm_utils import tokenizer_image_token
from llava.model.checkpoints.tokenizer import read_tokenizer

TEXTS = (
    "USER: Which digit is it? ASSISTANT:",
    " two blanks  inside, one in front",
    "\nlines\n\nand\ttabs ",
    "Éclair 日本 😀 ﬁ",
    "2024-12345",
    "x",
    " ",
)


@pytest.fixture
def folder(parts: Parts, tmp_path: Path) -> Path:
    """A checkpoint that has nothing but ``tokenizer.model``."""
    write_original(parts, tmp_path / "foo", "llava", "bin", 1, True)
    assert not list((tmp_path / "foo").glob("*token*.json"))
    return tmp_path / "foo"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece(parts: Parts, folder: Path, text: str) -> None:
    tokenizer = read_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_proto=parts.sentencepiece_model)
    assert tokenizer(text).input_ids == [1, *reference.encode(text)]
    prompt = tokenizer_image_token(f"{text}<image>\n{text}", tokenizer)
    assert prompt == [1, *reference.encode(text), -200, *reference.encode(f"\n{text}")]


@pytest.mark.parametrize("text", TEXTS)
def test_saving_keeps_the_ids(folder: Path, tmp_path: Path, text: str) -> None:
    tokenizer = read_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert read_tokenizer(tmp_path / "saved")(text).input_ids == tokenizer(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == tokenizer(text).input_ids


def test_the_image_token_is_the_first_new_id(parts: Parts, folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids("<image>") == parts.vocab_size == len(tokenizer) - 1
    assert tokenizer("a<image>b").input_ids.count(parts.vocab_size) == 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.padding_side == "right"


def test_settings_beside_the_model_are_honoured(parts: Parts, folder: Path) -> None:
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "left", "model_max_length": 99}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    tokenizer = read_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_proto=parts.sentencepiece_model)
    assert tokenizer("one two").input_ids == [*reference.encode("one two"), 2]
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 99


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_json_is_taken_as_it_stands(folder: Path, tmp_path: Path, legacy: bool) -> None:
    LlamaTokenizer.from_pretrained(folder, legacy=legacy).save_pretrained(tmp_path / "json")
    tokenizer = read_tokenizer(tmp_path / "json")
    expected = Tokenizer.from_file(str(tmp_path / "json" / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer(text).input_ids == expected.encode(text).ids, text


def test_a_model_that_changes_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece("nfkc"))
    with pytest.raises(ValueError, match="only byte-fallback BPE without text normalisation is read"):
        read_tokenizer(tmp_path)


def test_a_checkpoint_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer \(tokenizer.json or tokenizer.model\)"):
        read_tokenizer(tmp_path)
