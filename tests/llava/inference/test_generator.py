"""Batches of prompts: what an answer depends on, which layers ran, what is measured."""

from __future__ import annotations

import logging

import pytest
import torch
from PIL import Image

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_decoder_layers
from llava.conversation import get_template
from llava.inference.generator import GenerationOptions, Generator, make_message, pad_left
from llava.model.builder import Checkpoint

GREEDY = GenerationOptions(max_new_tokens=6)
IMAGE_TOKENS = 16


def mixed_messages(images: list[Image.Image]) -> list:
    """Questions of different lengths with one, none, two and one image."""
    return [
        make_message("w1 w2 w3 ?", images[:1]),
        make_message("w4 w5 ?", []),
        make_message("w6 w7 w8 w9 w10 ?", images[1:]),
        make_message("w11 w12 w13 w14 ?", images[2:]),
    ]


def test_an_answer_does_not_depend_on_its_batch(generator: Generator, images: list[Image.Image]) -> None:
    messages = mixed_messages(images)
    together = generator.generate(messages, GREEDY)
    assert len(set(map(tuple, together.kept_layers.tolist()))) > 1, "the rows of this test should be routed differently"
    for row, message in enumerate(messages):
        alone = generator.generate([message], GREEDY)
        assert alone.texts == [together.texts[row]]
        assert alone.num_new_tokens == [together.num_new_tokens[row]]
        assert alone.num_prompt_tokens == [together.num_prompt_tokens[row]]
        assert torch.equal(alone.kept_layers[0], together.kept_layers[row])


def test_decisions_are_the_rows_that_ran(generator: Generator, images: list[Image.Image]) -> None:
    ran = torch.zeros(4, dtype=torch.long)
    for index, layer in enumerate(find_decoder_layers(generator.model)):

        def count(module, args, kwargs, index=index):
            ran[index] += kwargs["hidden_states"].shape[0] if "hidden_states" in kwargs else args[0].shape[0]

        layer.self_attn.register_forward_pre_hook(count, with_kwargs=True)
    output = generator.generate(mixed_messages(images), GenerationOptions(max_new_tokens=1))
    assert torch.equal(ran, output.kept_layers.sum(dim=0))
    assert 0 < ran.min() and ran.max() < 2 * len(ran)
    assert not output.kept_layers.all()


def test_without_routing_every_layer_is_kept(generator: Generator, images: list[Image.Image]) -> None:
    set_skip_rate(generator.model, None)
    output = generator.generate(mixed_messages(images), GREEDY)
    assert output.kept_layers.shape == (4, 4) and output.kept_layers.all()


def test_the_beams_of_an_example_share_its_decision(generator: Generator, images: list[Image.Image]) -> None:
    messages = mixed_messages(images)
    greedy = generator.generate(messages, GREEDY)
    beams = generator.generate(messages, GenerationOptions(max_new_tokens=6, num_beams=3))
    assert torch.equal(beams.kept_layers, greedy.kept_layers)


def test_an_answer_stops_at_a_stop_string(generator: Generator, images: list[Image.Image]) -> None:
    message = make_message("w1 w2 w3 ?", images[:1])
    words = generator.generate([message], GREEDY).texts[0].split()
    stop = next(word for index, word in enumerate(words) if index and word not in words[:index])
    output = generator.generate([message], GenerationOptions(max_new_tokens=6, until=(stop,)))
    assert output.texts[0].split() == words[: words.index(stop)]
    assert output.num_new_tokens == [words.index(stop) + 1]


def test_the_end_of_sequence_ends_an_answer(generator: Generator, images: list[Image.Image]) -> None:
    messages = mixed_messages(images)
    first = generator.generate(messages, GREEDY)
    tokens = generator.tokenizer(first.texts[0], add_special_tokens=False).input_ids
    generator.end_tokens = {tokens[1]}
    shorter = generator.generate(messages, GREEDY)
    assert shorter.num_new_tokens[0] == 2
    assert max(shorter.num_new_tokens) <= 6


def test_text_without_images_is_answered(generator: Generator) -> None:
    output = generator.generate([make_message("w1 ?", []), make_message("w2 w3 ?", [])], GREEDY)
    assert all(output.texts) and output.num_prompt_tokens[1] == output.num_prompt_tokens[0] + 1


def test_sampling_and_greedy_need_no_other_settings_of_the_model(
    routed: Checkpoint, images: list[Image.Image], recwarn: pytest.WarningsRecorder
) -> None:
    routed.model.generation_config.update(do_sample=True, temperature=0.9, top_p=0.6)  # as Vicuna's
    generator = Generator(routed, get_template("digits"))
    texts = {generator.generate(mixed_messages(images), GREEDY).texts[0] for _ in range(3)}
    assert len(texts) == 1
    sampled = GenerationOptions(max_new_tokens=6, do_sample=True, temperature=5.0)
    assert len({generator.generate(mixed_messages(images), sampled).texts[0] for _ in range(8)}) > 1
    assert not [warning for warning in recwarn if "temperature" in str(warning.message)]


def test_prompts_hold_the_images_where_training_has_them(generator: Generator, images: list[Image.Image]) -> None:
    inputs = generator.encode([make_message("w1 ?", images[:2]), make_message("w2 ?", [])])
    image_token = generator.model.config.image_token_id
    words = generator.tokenizer.convert_ids_to_tokens
    first, second = inputs["input_ids"].tolist()
    assert words(first[:3]) == ["<s>", "USER", ":"]
    assert first[3 : 3 + 2 * IMAGE_TOKENS] == [image_token] * 2 * IMAGE_TOKENS
    assert words(first[3 + 2 * IMAGE_TOKENS :]) == ["w1", "?", "ASSISTANT", ":"]
    assert words(second[-7:]) == ["<s>", "USER", ":", "w2", "?", "ASSISTANT", ":"]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [7 + 2 * IMAGE_TOKENS, 7]
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)


def test_markers_in_the_text_are_kept(images: list[Image.Image]) -> None:
    assert make_message("w1 ?", images[:2]).text == "<image>\n<image>\nw1 ?"
    assert make_message("w1 <image> w2 <image>", images[:2]).text == "w1 <image> w2 <image>"
    assert make_message("w1 ?", []).text == "w1 ?"
    with pytest.raises(ValueError, match="has 1 <image> markers, but there are 2 images"):
        make_message("w1 <image>", images[:2])
    with pytest.raises(ValueError, match="has 1 <image> markers, but there are 0 images"):
        make_message("w1 <image>", [])


def test_padding_goes_in_front() -> None:
    ids, mask = pad_left([[5], [6, 7, 8]], 0)
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_prefill_and_decode_are_told_apart(generator: Generator, images: list[Image.Image]) -> None:
    messages = mixed_messages(images)
    one = generator.generate(messages, GenerationOptions(max_new_tokens=1))
    many = generator.generate(messages, GenerationOptions(max_new_tokens=40))
    assert one.prefill_ms > 0 and one.decode_ms < many.decode_ms
    assert many.decode_ms > many.prefill_ms


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
