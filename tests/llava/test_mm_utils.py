"""Promises of the image and prompt helpers that lmms-eval calls."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    expand2square,
    get_model_name_from_path,
    load_image_from_base64,
    process_anyres_image,
    process_images,
    select_best_resolution,
    tokenizer_image_token,
)

GRID = [[32, 64], [64, 32], [64, 64]]


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


@pytest.mark.parametrize("aspect", ["pad", "square", "original", None])
def test_images_of_any_mode_and_size_become_one_batch(image_processor, aspect: str) -> None:
    images = [Image.new("L", (20, 50)), Image.new("RGBA", (32, 32)), Image.new("P", (70, 33))]
    pixel_values = process_images(images, image_processor, SimpleNamespace(image_aspect_ratio=aspect))
    assert pixel_values.shape == (3, 3, 32, 32)


def test_pixel_values_are_those_of_the_processor(image_processor) -> None:
    tall = Image.linear_gradient("L").convert("RGB").resize((32, 64))
    squared = expand2square(tall, (122, 116, 104))  # CLIP's mean colour, as LLaVA rounds it
    padded = process_images([tall], image_processor, SimpleNamespace(image_aspect_ratio="pad"))
    assert torch.equal(padded, image_processor(squared, return_tensors="pt")["pixel_values"])
    for aspect in ("square", "original"):
        cropped = process_images([tall], image_processor, SimpleNamespace(image_aspect_ratio=aspect))
        assert torch.equal(cropped, image_processor(tall, return_tensors="pt")["pixel_values"])


def test_an_unknown_way_to_fit_is_named_with_the_known_ones(image_processor) -> None:
    with pytest.raises(ValueError, match="image_aspect_ratio is 'anyres_max_9'; use pad, square, original, anyres"):
        process_images([], image_processor, SimpleNamespace(image_aspect_ratio="anyres_max_9"))


@pytest.mark.parametrize(
    ("size", "best"),
    [
        ((10, 40), (32, 64)),  # tall
        ((40, 10), (64, 32)),  # wide
        ((20, 20), (32, 64)),  # all keep everything, the first of the two smallest wastes least
        ((100, 100), (64, 64)),  # only this one keeps 64 x 64 pixels
        ((64, 64), (64, 64)),
    ],
)
def test_the_best_resolution_keeps_most_and_wastes_least(size: tuple[int, int], best: tuple[int, int]) -> None:
    assert select_best_resolution(size, GRID) == best


@pytest.mark.parametrize("grid", [GRID, str(GRID)])
def test_an_image_becomes_an_overview_and_tiles_row_by_row(image_processor, grid) -> None:
    wide = Image.new("RGB", (64, 16), "white")
    wide.paste("red", (0, 0, 32, 16))
    views = process_anyres_image(wide, image_processor, grid)
    assert views.shape == (3, 3, 32, 32)  # an overview, and 64 x 32 in two tiles
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    colours = (views * std + mean).round(decimals=2)
    assert colours[1, :, 16, 16].tolist() == [1, 0, 0] and colours[2, :, 16, 16].tolist() == [1, 1, 1]
    assert colours[1:, :, 0].abs().max() == 0 and colours[1:, :, -1].abs().max() == 0  # black above and below
    assert colours[0, :, 0, 0].tolist() == [1, 0, 0] and colours[0, :, -1, -1].tolist() == [1, 1, 1]  # all of it


def test_tiled_images_are_one_tensor_only_where_they_have_as_many_tiles(image_processor) -> None:
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=GRID)
    wide, tall, large = Image.new("RGB", (40, 10)), Image.new("RGB", (10, 40)), Image.new("RGB", (99, 99))
    assert process_images([wide, tall], image_processor, config).shape == (2, 3, 3, 32, 32)
    views = process_images([wide, large], image_processor, config)
    assert [tuple(view.shape) for view in views] == [(3, 3, 32, 32), (5, 3, 32, 32)]
    with pytest.raises(ValueError, match="'anyres', but the configuration has no image_grid_pinpoints"):
        process_images([wide], image_processor, SimpleNamespace(image_aspect_ratio="anyres"))


def test_an_image_comes_back_from_base64() -> None:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(file, format="PNG")
    encoded = base64.b64encode(file.getvalue())
    for form in (encoded, encoded.decode()):
        image = load_image_from_base64(form)
        assert image.size == (3, 2) and image.getpixel((0, 0)) == (1, 2, 3)


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


PROMPTS = torch.tensor([[1, 5, 7, 8], [1, 5, 7, 9]])  # "<s> USER : w0" and "<s> USER : w1"


def ended(criterion: KeywordsStoppingCriteria, answers: list[list[int]], with_prompt: bool) -> list[bool]:
    """Which rows a criterion ends, shown answers alone as LLaVA's ``generate`` does, or behind their prompts."""
    ids = torch.tensor(answers)
    ids = torch.cat([PROMPTS.repeat_interleave(len(ids) // 2, dim=0), ids], dim=1) if with_prompt else ids
    verdict = criterion(ids, None)
    assert verdict.dtype == torch.bool and verdict.shape == (len(ids),)
    return verdict.tolist()


@pytest.mark.parametrize("with_prompt", [False, True])
def test_a_keyword_ends_the_row_whose_answer_holds_it(word_tokenizer, with_prompt: bool) -> None:
    criterion = KeywordsStoppingCriteria(["w3 w4"], word_tokenizer, PROMPTS)
    assert ended(criterion, [[11, 10], [11, 12]], with_prompt) == [False, True]
    assert ended(criterion, [[11], [12]], with_prompt) == [False, False]
    assert ended(criterion, [[10, 11, 12], [10, 10, 10]], with_prompt) == [True, False]


@pytest.mark.parametrize("with_prompt", [False, True])
def test_keywords_in_the_prompt_do_not_count(word_tokenizer, with_prompt: bool) -> None:
    criterion = KeywordsStoppingCriteria(["w0", "USER"], word_tokenizer, PROMPTS)
    assert ended(criterion, [[9, 9], [9, 9]], with_prompt) == [False, False]
    assert ended(criterion, [[9, 9], [9, 8]], with_prompt) == [False, True]
    long = [[9] * 9, [9] * 8 + [5]]  # longer than the prompts
    assert ended(criterion, long, with_prompt) == [False, True]


def test_special_tokens_are_keywords_too_and_beams_share_their_prompt(word_tokenizer) -> None:
    criterion = KeywordsStoppingCriteria(["</s>"], word_tokenizer, PROMPTS)
    beams = [[9, 2], [9, 9], [2, 9], [9, 8]]
    assert ended(criterion, beams, True) == ended(criterion, beams, False) == [True, False, True, False]


def test_a_keyword_of_many_tokens_is_found(bpe_tokenizer) -> None:
    prompts = torch.tensor([bpe_tokenizer("Hello").input_ids])
    answer = bpe_tokenizer("and so on ###STOP###", add_special_tokens=False).input_ids
    criterion = KeywordsStoppingCriteria(["###STOP###"], bpe_tokenizer, prompts)
    verdicts = [criterion(torch.tensor([answer[: end + 1]]), None).item() for end in range(len(answer))]
    assert verdicts == [False] * (len(answer) - 1) + [True]
