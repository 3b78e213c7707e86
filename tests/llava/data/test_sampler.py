"""Promises of the order of training samples, mixed and single modality, tiny and empty sets included."""

from __future__ import annotations

import pytest
import torch

from llava.data.dataset import MEGABATCH, ModalityLengthSampler

SETS = {
    "mixed": [(-1) ** index * (index % 37 + 1) for index in range(1001)],
    "images only": [index % 37 + 1 for index in range(500)],
    "text only": [-(index % 37) - 1 for index in range(500)],
    "one text among images": [5] * 30 + [-9],
    "fewer than a batch": [3, -4, 5],
    "one sample": [7],
    "one text": [-7],
    "empty": [],
}


def draw(lengths: list[int], batch_size: int = 8, seed: int = 0) -> list[int]:
    return list(ModalityLengthSampler(lengths, batch_size, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_every_sample_comes_once(name: str, batch_size: int) -> None:
    lengths = SETS[name]
    assert sorted(draw(lengths, batch_size)) == list(range(len(lengths)))
    assert len(ModalityLengthSampler(lengths, batch_size)) == len(lengths)


@pytest.mark.parametrize("name", SETS)
def test_every_whole_batch_holds_one_modality(name: str) -> None:
    lengths, order = SETS[name], draw(SETS[name])
    num_whole = sum(sum(sign * length > 0 for length in lengths) // 8 for sign in (1, -1))
    for start in range(0, 8 * num_whole, 8):
        batch = [lengths[index] > 0 for index in order[start : start + 8]]
        assert len(set(batch)) == 1
    rest = [lengths[index] > 0 for index in order[8 * num_whole :]]
    assert max(rest.count(True), rest.count(False)) < 8


def test_batches_hold_samples_of_similar_length() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 1000, (8 * MEGABATCH * 2,), generator=generator).tolist()
    order = draw(lengths)
    spreads = []
    for start in range(0, len(order), 8):
        batch = [lengths[index] for index in order[start : start + 8]]
        assert batch == sorted(batch, reverse=True)
        spreads.append(max(batch) - min(batch))
    assert sum(spreads) / len(spreads) < 60  # 8 samples at random would spread over nearly 800


def test_batches_come_in_random_order() -> None:
    lengths = list(range(1, 801))
    first_lengths = [lengths[index] for index in draw(lengths)[::8]]
    assert first_lengths != sorted(first_lengths, reverse=True)


def test_the_order_follows_the_generator() -> None:
    lengths = SETS["mixed"]
    assert draw(lengths) == draw(lengths) != draw(lengths, seed=1)
    sampler = ModalityLengthSampler(lengths, 8, torch.Generator().manual_seed(0))
    assert list(sampler) != list(sampler), "epochs differ"


def test_ranks_share_the_lengths_of_a_global_batch_evenly() -> None:
    lengths = list(range(1, 65))
    order = list(ModalityLengthSampler(lengths, 16, torch.Generator().manual_seed(0), num_ranks=2))
    assert sorted(order) == list(range(64))
    for start in range(0, 64, 16):
        first = [lengths[index] for index in order[start : start + 8]]
        second = [lengths[index] for index in order[start + 8 : start + 16]]
        assert abs(sum(first) - sum(second)) == 8
        assert max(first + second) - min(first + second) == 15
