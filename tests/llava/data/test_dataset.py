"""Promises of the training set: samples as tensors, their order in an epoch, batches, and errors that name a record."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.constants import IGNORE_INDEX
from llava.data.dataset import MEGABATCH, ModalityLengthSampler, SFTCollator, SFTDataset
from llava.data.preprocess import estimate_length
from llava.data.records import RecordError
from llava.mm_utils import process_images


def test_a_sample_has_ids_labels_turns_and_pixels(sft_dataset: SFTDataset) -> None:
    sample = sft_dataset[1]
    assert set(sample) == {"input_ids", "labels", "turn_ids", "pixel_values", "sample_index"}
    assert sample["sample_index"] == 1
    assert sample["input_ids"].shape == sample["labels"].shape == sample["turn_ids"].shape
    assert (sample["input_ids"] == 4).sum() == 16
    assert sample["turn_ids"].unique().tolist() == [0, 1, 2]
    learned = sample["labels"] != IGNORE_INDEX
    assert sft_dataset.tokenizer.decode(sample["labels"][learned]).replace(" ", "") == "4</s>none</s>"
    assert sample["pixel_values"].shape == (1, 3, 32, 32) and sample["pixel_values"].dtype == torch.float32


def test_text_only_samples_have_no_pixels(sft_dataset: SFTDataset) -> None:
    assert [sample["pixel_values"] is None for sample in sft_dataset] == [False, False, True, False, True, False]


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_images_are_prepared_as_at_inference(sft_dataset: SFTDataset, record_folder: Path, aspect: str) -> None:
    sft_dataset.image_aspect_ratio = aspect
    config = type("Config", (), {"image_aspect_ratio": aspect})
    with Image.open(record_folder / "blue.png") as image:
        expected = process_images([image], sft_dataset.image_processor, config)
    assert torch.equal(sft_dataset[1]["pixel_values"], expected)


def test_lengths_count_bytes_and_image_positions_and_are_negative_for_text(
    sft_dataset: SFTDataset, record_folder: Path
) -> None:
    sizes = [len(json.dumps(record)) // 4 for record in json.loads((record_folder / "records.json").read_text())]
    images = [16, 16, 0, 16, 0, 16]
    assert sft_dataset.modality_lengths().tolist() == [
        size + image if image else -size for size, image in zip(sizes, images, strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"image": "a.jpg"}', 25 + 5),
        (b'{"image" :["a.jpg", "b.jpg"], "v": "<image><image>"}', 25 + 10),
        (b'{"image": ["a.jpg"], "v": "\\u003cimage\\u003e"}', 25 + 5),
        (b'{"image": null}', -25),
        (b'{"v": "say \\"image\\": \\"x\\" <image>"}', -25),
        (b"{}", -25),
    ],
)
def test_a_length_is_estimated_from_a_hundred_bytes(text: bytes, expected: int) -> None:
    assert estimate_length(text.ljust(100), 5) == expected


def test_a_dataset_travels_to_data_loader_workers(sft_dataset: SFTDataset) -> None:
    sft_dataset[0]
    twin = pickle.loads(pickle.dumps(sft_dataset))
    assert torch.equal(twin[3]["input_ids"], sft_dataset[3]["input_ids"])


@pytest.mark.parametrize(
    ("max_length", "index", "message"),
    [
        (10, 1, r"record 1 \(id 'two'\): The image tokens end at position \d+, beyond model_max_length 10"),
        (6, 2, r"record 2 \(id 'text'\): no answer within 6 tokens"),
    ],
)
def test_a_sample_that_does_not_fit_names_its_record(
    sft_dataset: SFTDataset, max_length: int, index: int, message: str
) -> None:
    sft_dataset.max_length = max_length
    with pytest.raises(RecordError, match=message):
        sft_dataset[index]


def test_a_broken_image_names_its_record(sft_dataset: SFTDataset, record_folder: Path) -> None:
    (record_folder / "red.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(RecordError, match=r"records.json: record 0 \(id 'one'\): Image .*red.png' does not decode"):
        sft_dataset[0]
    (record_folder / "red.png").unlink()
    with pytest.raises(RecordError, match=r"record 5 \(id 'plain'\): Image 'red.png' is not in"):
        sft_dataset[5]


def test_an_image_outside_the_folder_is_never_opened(sft_dataset: SFTDataset, record_folder: Path) -> None:
    (record_folder / "inside").mkdir()
    bad = [{"id": "x", "image": "../red.png", "conversations": [{"from": "human", "value": "<image>\nq"}]}]
    bad[0]["conversations"].append({"from": "gpt", "value": "a"})
    (record_folder / "bad.json").write_text(json.dumps(bad))
    options = (sft_dataset.tokenizer, sft_dataset.image_processor, "digits", 16, 4)
    dataset = SFTDataset(record_folder / "bad.json", record_folder / "inside", *options)
    with pytest.raises(RecordError, match="climbs out"):
        dataset[0]


def test_an_unknown_template_fails_before_the_first_sample(sft_dataset: SFTDataset, record_folder: Path) -> None:
    options = (sft_dataset.tokenizer, sft_dataset.image_processor, "v9", 16, 4)
    with pytest.raises(KeyError, match="template 'v9' is unknown"):
        SFTDataset(record_folder / "records.json", record_folder, *options)


# Batches: literal samples in, literal tensors out.


def sample(ids: list[int], labels: list[int], turns: list[int], num_images: int = 0, value: float = 0.0) -> dict:
    pixels = torch.full((num_images, 3, 2, 2), value) if num_images else None
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "turn_ids": torch.tensor(turns),
        "pixel_values": pixels,
    }


def test_samples_are_padded_on_the_right() -> None:
    batch = SFTCollator(pad_token_id=3)(
        [sample([1, 9, 8, 2], [-100, -100, 8, 2], [0, 1, 1, 1]), sample([1, 3], [-100, 3], [1, 1])]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 9, 8, 2], [1, 3, 3, 3]],
        "labels": [[-100, -100, 8, 2], [-100, 3, -100, -100]],
        "turn_ids": [[0, 1, 1, 1], [1, 1, -1, -1]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
    }
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_images_are_stacked_in_the_order_of_the_samples() -> None:
    batch = SFTCollator(0)([sample([1], [1], [1], 2, 5.0), sample([1], [1], [1]), sample([1], [1], [1], 1, 7.0)])
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 5, 7]


def test_a_batch_without_images_has_no_pixel_values() -> None:
    assert "pixel_values" not in SFTCollator(0)([sample([1], [1], [1])])


def test_samples_of_the_dataset_make_a_batch(sft_dataset) -> None:
    batch = SFTCollator(sft_dataset.tokenizer.pad_token_id)(list(sft_dataset))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert (batch["input_ids"] == 4).sum(dim=1).tolist() == [16, 16, 0, 16, 0, 16]
    for row, original in enumerate(sft_dataset):
        length = len(original["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], original["input_ids"])
        assert batch["attention_mask"][row].sum() == length


def test_a_tokenizer_without_padding_token_pads_under_the_mask() -> None:
    batch = SFTCollator(None)([sample([5, 5], [-100, 5], [0, 1]), sample([5], [5], [1])])
    assert batch["input_ids"].tolist() == [[5, 5], [5, 0]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("pad_token_id", [0, 2, 9])
def test_the_mask_is_not_misled_by_padding_ids_in_the_text(pad_token_id: int) -> None:
    batch = SFTCollator(pad_token_id)([sample([pad_token_id] * 3, [-100, 5, 5], [0, 1, 1]), sample([1], [1], [1])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# The order of samples, mixed and of one modality, tiny and empty sets included.


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
