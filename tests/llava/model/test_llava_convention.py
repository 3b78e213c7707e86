"""Promises of image markers and of the images that come for them: literal input, literal output."""

from __future__ import annotations

import pytest
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.llava_convention import (
    expand_markers,
    has_markers,
    images_per_row,
    infer_attention_mask,
    match_images,
    stack_images,
)

M, I = IMAGE_TOKEN_INDEX, 9  # noqa: E741
IDS = torch.tensor([[1, M, 2, 0], [3, 0, 0, 0], [M, 4, M, 5]])
MASK = IDS != 0
LENGTHS = [2, 1, 3]


def test_each_marker_becomes_as_many_tokens_as_its_image_takes() -> None:
    right = expand_markers(IDS, MASK, LENGTHS, I)
    assert right.input_ids.tolist() == [[1, I, I, 2, 0, 0], [3, 0, 0, 0, 0, 0], [I, 4, I, I, I, 5]]
    assert right.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1] * 6]
    left = expand_markers(IDS, MASK, LENGTHS, I, padding_id=7, is_padded_left=True)
    assert left.input_ids.tolist() == [[7, 7, 1, I, I, 2], [7, 7, 7, 7, 7, 3], [I, 4, I, I, I, 5]]
    assert left.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1] * 6]
    assert right.labels is None and right.attention_mask.dtype == torch.int64


def test_labels_are_ignored_at_images_and_padding() -> None:
    labels = torch.tensor([[IGNORE_INDEX, 8, 2, 8], [3, 8, 8, 8], [8, 4, 8, 5]])
    found = expand_markers(IDS, MASK, LENGTHS, I, labels=labels).labels
    X = IGNORE_INDEX
    assert found.tolist() == [[X, X, X, 2, X, X], [3, X, X, X, X, X], [X, 4, X, X, X, 5]]


def test_padding_may_lie_anywhere_between_tokens() -> None:
    mask = torch.tensor([[True, False, True, True]])
    found = expand_markers(torch.tensor([[1, 5, M, 2]]), mask, [1], I)
    assert found.input_ids.tolist() == [[1, I, 2]]


def test_every_image_needs_its_marker() -> None:
    with pytest.raises(ValueError, match="3 markers meet 2 images; give one image per marker"):
        expand_markers(IDS, MASK, LENGTHS[:2], I)


def test_markers_are_looked_for_in_prompts_only() -> None:
    assert has_markers(IDS) and not has_markers(None) and not has_markers(torch.tensor([[1, 2]]))
    assert not has_markers(torch.tensor([[M]]))  # one position is a step of decoding


def test_padding_is_told_from_text_at_the_ends_of_rows_only() -> None:
    ids = torch.tensor([[0, 0, 1, 0, 2], [1, 0, 2, 0, 0], [0, 0, 0, 0, 0]])
    expected = [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert infer_attention_mask(ids, 0).long().tolist() == expected
    assert infer_attention_mask(ids, None).all()


def test_images_are_counted_row_by_row() -> None:
    ids = torch.tensor([[I, I, 1, I], [1, 2, 3, 4], [I, I, I, 5]])
    assert images_per_row(ids, I, 3) == [2, 0, 1]  # one run each
    assert images_per_row(torch.tensor([[I, I, I, I], [1, I, I, 2]]), I, 3) == [2, 0 + 1]  # equally long ones
    with pytest.raises(ValueError, match="4 images meet 6 image tokens in runs of"):
        images_per_row(ids, I, 4)


def test_images_of_every_form_become_one_stack() -> None:
    images = torch.arange(3 * 12.0).view(3, 3, 2, 2)
    for form in (images, list(images), tuple(images), list(images.unsqueeze(1))):
        views, counts = stack_images(form)
        assert torch.equal(views, images) and counts == [1, 1, 1]
    tiles, counts = stack_images([images[:2], images[2:]])
    assert torch.equal(tiles, images) and counts == [2, 1]
    tiles, counts = stack_images(images.unsqueeze(0))
    assert torch.equal(tiles, images) and counts == [3]
    assert stack_images(None) == stack_images([]) == (None, [])
    views, counts = stack_images(torch.empty(0, 3, 2, 2))
    assert counts == []


def test_a_black_image_beside_text_is_dropped_and_any_other_refused() -> None:
    views = torch.stack([torch.full((3, 2, 2), value) for value in (1.0, 0.0, 2.0)])
    used, counts = match_images([1, 0, 1], views, [1, 1, 1])
    assert torch.equal(used, views[[0, 2]]) and counts == [1, 1]
    assert match_images([0], views[1:2], [1]) == (None, [])
    with pytest.raises(ValueError, match="3 images meet prompts with \\[1, 0, 1\\] image markers"):
        match_images([1, 0, 1], views + 1, [1, 1, 1])
    same, counts = match_images([2, 1], views, [1, 1, 1])
    assert same is views and counts == [1, 1, 1]
