"""Promises of the image and prompt helpers that lmms-eval calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import expand2square, get_model_name_from_path, process_images, tokenizer_image_token


@pytest.mark.parametrize(("size", "box"), [((4, 2), (0, 1, 4, 3)), ((2, 5), (1, 0, 3, 5))])
def test_an_image_is_centred_on_a_square_of_the_background(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    square = expand2square(Image.new("RGB", size, (9, 8, 7)), (1, 2, 3))
    assert square.size == (max(size), max(size))
    for x in range(square.width):
        for y in range(square.height):
            inside = box[0] <= x < box[2] and box[1] <= y < box[3]
            assert square.getpixel((x, y)) == ((9, 8, 7) if inside else (1, 2, 3))


def test_a_square_image_is_returned_as_it_is() -> None:
    image = Image.new("RGB", (3, 3))
    assert expand2square(image, (0, 0, 0)) is image


def test_padding_keeps_what_cropping_loses(image_processor) -> None:
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (0, 0, 16, 32))  # a stripe at the left end
    padded = process_images([wide], image_processor, SimpleNamespace(image_aspect_ratio="pad"))
    cropped = process_images([wide], image_processor, SimpleNamespace())
    assert padded.shape == cropped.shape == (1, 3, 32, 32) and padded.dtype == torch.float32
    assert cropped.amax() < 0 < 1 < padded.amax()
    mean = torch.tensor(image_processor.image_mean).view(3, 1)
    std = torch.tensor(image_processor.image_std).view(3, 1)
    assert (padded[0, :, 0] * std + mean - mean).abs().max() < 1 / 255 + 1e-6  # the margin is the mean colour


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_images_of_any_mode_and_size_become_one_batch(image_processor, aspect: str) -> None:
    images = [Image.new("L", (20, 50)), Image.new("RGBA", (32, 32)), Image.new("P", (70, 33))]
    pixel_values = process_images(images, image_processor, SimpleNamespace(image_aspect_ratio=aspect))
    assert pixel_values.shape == (3, 3, 32, 32)


def test_each_marker_becomes_one_placeholder(word_tokenizer) -> None:
    ids = tokenizer_image_token("USER: <image>\nw0 <image> w1", word_tokenizer)
    assert ids == [1, 5, 7, IMAGE_TOKEN_INDEX, 8, IMAGE_TOKEN_INDEX, 9]
    assert tokenizer_image_token("<image>", word_tokenizer, image_token_index=4) == [1, 4]
    assert tokenizer_image_token("w0 w1", word_tokenizer) == [1, 8, 9]


def test_a_tokenizer_without_beginning_token_loses_nothing() -> None:
    class Characters:
        bos_token_id = None

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[ord(character) for character in text])

    assert tokenizer_image_token("a<image>bc", Characters()) == [97, IMAGE_TOKEN_INDEX, 98, 99]
    assert tokenizer_image_token("<image>b", Characters()) == [IMAGE_TOKEN_INDEX, 98]


def test_tensors_come_on_request_and_other_formats_are_refused(word_tokenizer) -> None:
    ids = tokenizer_image_token("w0 <image>", word_tokenizer, return_tensors="pt")
    assert ids.dtype == torch.long and ids.tolist() == [1, 8, IMAGE_TOKEN_INDEX]
    with pytest.raises(ValueError, match="return_tensors='np' is not supported; use None or 'pt'"):
        tokenizer_image_token("w0", word_tokenizer, return_tensors="np")


@pytest.mark.parametrize(
    ("path", "name"),
    [("/a/llava-7b/", "llava-7b"), ("a/run/checkpoint-20", "run_checkpoint-20"), ("checkpoint-3", "checkpoint-3")],
)
def test_the_model_name_is_the_last_part_of_the_path(path: str, name: str) -> None:
    assert get_model_name_from_path(path) == name
