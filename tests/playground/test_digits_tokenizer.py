"""Promises of the digits tokenizer."""

from __future__ import annotations

import re
from random import Random

import pytest
from transformers import AutoTokenizer

from playground.digits.generate import draw_evaluation_records, draw_training_records
from playground.digits.questions import NUMBER_NAMES
from playground.digits.scans import split_scans
from playground.digits.tokenizer import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict]]:
    scans = split_scans(seed=0)
    _, train = draw_training_records(scans["train"], 900, 100, Random(0))
    _, test = draw_evaluation_records("test", scans["test"], 264, 22, Random(1))
    return {"train": train, "test": test}


@pytest.fixture(scope="module")
def tokenizer(records):
    return train_tokenizer(records["train"])


def texts_of(record: dict) -> list[str]:
    return [message["value"].removeprefix("<image>\n") for message in record["conversations"]]


def test_tokenizer_round_trips_conversations_and_other_english(records, tokenizer):
    values = [message["value"] for record in records["test"] for message in record["conversations"]]
    values += ['Why is "x^2" > 5 % of #7?\nBecause (I) said: so!', "  two  spaces "]
    for value in values:
        ids = tokenizer(f"USER: {value} ASSISTANT:").input_ids
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == f"USER: {value} ASSISTANT:"


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "USER: <image>\nRead the top row. ASSISTANT: seven, empty</s>USER: Why? ASSISTANT:"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == f"<s> {text}"
    assert (loaded.image_token, loaded.image_token_id) == ("<image>", 4)
    assert [loaded.unk_token, loaded.bos_token, loaded.eos_token, loaded.pad_token] == list(SPECIAL_TOKENS[:4])
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]


def test_words_of_the_dataset_are_single_tokens(records, tokenizer):
    text = " ".join(text for record in records["test"] for text in texts_of(record))
    words = {*re.findall(r"[A-Za-z]+", text), *NUMBER_NAMES, "USER", "ASSISTANT"}
    assert len(words) > 60
    assert [word for word in sorted(words) if len(tokenizer.tokenize(word)) > 1] == []
    assert len(tokenizer) <= 320


def test_read_all_answers_are_long_and_the_others_short(records, tokenizer):
    for record in records["test"]:
        _, answer = texts_of(record)
        num_words = len(re.findall(r"\w+", answer))
        num_tokens = len(tokenizer(answer, add_special_tokens=False).input_ids)
        if record["type"] == "read_all":
            assert num_words >= 32 and num_tokens >= 32
        else:
            assert num_tokens <= 3


def test_tokenizer_is_deterministic(records, tokenizer):
    again = train_tokenizer(records["train"])
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_too_small_vocabulary_is_refused(records):
    with pytest.raises(ValueError, match="alphabet alone need 101"):
        train_tokenizer(records["train"], vocabulary_size=50)
