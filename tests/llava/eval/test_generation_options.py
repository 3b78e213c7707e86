"""Reading lmms-eval's generation keywords."""

from __future__ import annotations

import logging

import pytest

from llava.eval.generation_options import GenerationOptions


@pytest.mark.parametrize(
    ("gen_kwargs", "expected"),
    [
        ({}, GenerationOptions()),
        ({"until": ["\n\n"], "do_sample": False}, GenerationOptions()),
        ({"until": "ASSISTANT:"}, GenerationOptions(until=("ASSISTANT:",))),
        ({"until": ["\n\n", "stop", ""]}, GenerationOptions(until=("stop",))),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}, GenerationOptions(max_new_tokens=16)),
        ({"temperature": 0.7}, GenerationOptions(do_sample=True, temperature=0.7)),
        ({"temperature": 0.7, "do_sample": False}, GenerationOptions()),
        ({"temperature": 0, "do_sample": True}, GenerationOptions()),
        ({"do_sample": True, "top_p": 0.9}, GenerationOptions(do_sample=True, top_p=0.9)),
        ({"num_beams": 4, "max_new_tokens": None}, GenerationOptions(num_beams=4)),
    ],
)
def test_keywords_become_options(gen_kwargs: dict, expected: GenerationOptions) -> None:
    before = dict(gen_kwargs)
    assert GenerationOptions.from_gen_kwargs(gen_kwargs) == expected
    assert gen_kwargs == before, "the task's own dictionary was changed"


def test_keywords_for_other_models_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GenerationOptions.from_gen_kwargs({"image_aspect_ratio": "original", "max_new_tokens": 4})
    assert "image_aspect_ratio" in caplog.text and "max_new_tokens" not in caplog.text


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        GenerationOptions.from_gen_kwargs({name: 0})


def test_an_answer_ends_at_its_first_stop_string() -> None:
    options = GenerationOptions(until=("USER", "###"))
    assert options.cut(" seven ### eight USER nine") == "seven"
    assert options.cut(" seven ") == "seven"
