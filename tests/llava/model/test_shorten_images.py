"""Promises of shortened batches, on literal ones: what is left keeps its label, turn and place."""

from __future__ import annotations

import pytest
import torch

from llava.model.token_pruning import shorten_images
from llava.model.visual_tokens import image_lengths

IMAGE = 9


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows)


TRAINING = {  # one image of 4; text only; two images of 4, each followed by text
    "input_ids": tensor(
        [1, 9, 9, 9, 9, 5, 6, 2, 0, 0, 0],
        [1, 5, 6, 7, 2, 0, 0, 0, 0, 0, 0],
        [1, 9, 9, 9, 9, 5, 9, 9, 9, 9, 2],
    ),
    "labels": tensor(
        [-100] * 6 + [6, 2] + [-100] * 3, [-100, -100, 6, 7, 2] + [-100] * 6, [-100] * 5 + [5] + [-100] * 4 + [2]
    ),
    "turn_ids": tensor([0] * 5 + [1] * 3 + [-1] * 3, [0, 1, 1, 1, 1] + [-1] * 6, [0] * 5 + [1] + [0] * 4 + [2]),
    "attention_mask": tensor([1] * 8 + [0] * 3, [1] * 5 + [0] * 6, [1] * 11),
    "pixel_values": torch.zeros(3, 3, 2, 2),
}


def test_a_training_batch_keeps_labels_turns_and_padding_aligned() -> None:
    found = shorten_images(TRAINING, IMAGE, 4, 2, 0)
    expected = {
        "input_ids": tensor([1, 9, 9, 5, 6, 2, 0], [1, 5, 6, 7, 2, 0, 0], [1, 9, 9, 5, 9, 9, 2]),
        "labels": tensor(
            [-100] * 4 + [6, 2, -100], [-100, -100, 6, 7, 2, -100, -100], [-100, -100, -100, 5, -100, -100, 2]
        ),
        "turn_ids": tensor([0, 0, 0, 1, 1, 1, -1], [0, 1, 1, 1, 1, -1, -1], [0, 0, 0, 1, 0, 0, 2]),
        "attention_mask": tensor([1] * 6 + [0], [1] * 5 + [0] * 2, [1] * 7),
    }
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found["pixel_values"] is TRAINING["pixel_values"] and set(found) == set(TRAINING)


def test_each_image_may_keep_its_own_number() -> None:
    found = shorten_images(TRAINING, IMAGE, 4, torch.tensor([1, 3, 4]), 0)
    assert found["input_ids"].tolist() == [
        [1, 9, 5, 6, 2, 0, 0, 0, 0, 0],
        [1, 5, 6, 7, 2, 0, 0, 0, 0, 0],
        [1, 9, 9, 9, 5, 9, 9, 9, 9, 2],
    ]
    assert image_lengths(found["input_ids"], IMAGE, 3) == [1, 3, 4]


def test_prompts_stay_padded_in_front() -> None:
    prompts = {"input_ids": tensor([3, 3, 1, 9, 9, 9, 9, 5], [1, 9, 9, 9, 9, 5, 6, 7])}
    mask = tensor([0, 0, 1, 1, 1, 1, 1, 1], [1] * 8)
    found = shorten_images({**prompts, "attention_mask": mask}, IMAGE, 4, 2, 3)
    assert found["input_ids"].tolist() == [[3, 3, 1, 9, 9, 5], [1, 9, 9, 5, 6, 7]]
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]


def test_rows_that_become_shorter_than_others_are_padded_in_front_under_a_new_mask() -> None:
    found = shorten_images({"input_ids": tensor([1, 9, 9, 9, 9, 5], [1, 5, 6, 7, 8, 2])}, IMAGE, 4, 1, 3)
    assert found["input_ids"].tolist() == [[3, 3, 3, 1, 9, 5], [1, 5, 6, 7, 8, 2]]
    assert found["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]


@pytest.mark.parametrize("num_kept", [4, torch.tensor([4, 4, 4])])
def test_nothing_changes_where_all_are_kept(num_kept) -> None:
    found = shorten_images(TRAINING, IMAGE, 4, num_kept, 0)
    assert all(found[name] is value for name, value in TRAINING.items())


@pytest.mark.parametrize(
    ("input_ids", "num_images", "lengths"),
    [
        ([[1, 9, 9, 5], [9, 9, 9, 2]], 2, [2, 3]),  # a run does not go on in the next row
        ([[9, 9, 1, 9], [5, 5, 5, 5]], 2, [2, 1]),
        ([[1, 9, 9, 9, 9, 2]], 2, [2, 2]),  # neighbours without text between them
        ([[9, 9], [9, 9]], 2, [2, 2]),
    ],
)
def test_lengths_of_images_are_read_from_the_ids(input_ids, num_images, lengths) -> None:
    assert image_lengths(torch.tensor(input_ids), IMAGE, num_images) == lengths


@pytest.mark.parametrize("input_ids", [[[1, 9, 9, 9, 2]], [[1, 5, 2]], [[9, 9, 9, 1], [9, 5, 5, 5]]])
def test_ids_that_do_not_fit_the_images_are_refused(input_ids) -> None:
    with pytest.raises(ValueError, match=f"{3 if len(input_ids) == 2 else 2} images meet"):
        image_lengths(torch.tensor(input_ids), IMAGE, 3 if len(input_ids) == 2 else 2)


@pytest.mark.parametrize(
    ("change", "num_kept", "message"),
    [
        ({}, 0, "between 0 and 0"),
        ({}, 5, "between 5 and 5"),
        ({}, torch.tensor([1, 2]), "for 3 images"),
        ({"input_ids": torch.tensor([[9, 9, 1]])}, 1, "multiples of 4"),
        ({"position_ids": torch.zeros(3, 11)}, 1, "position_ids"),
    ],
)
def test_batches_and_numbers_that_do_not_fit_are_refused(change, num_kept, message) -> None:
    with pytest.raises(ValueError, match=message):
        shorten_images({**TRAINING, **change}, IMAGE, 4, num_kept, 0)
