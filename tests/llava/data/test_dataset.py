"""Promises of the training set: samples as tensors, and errors that name their record."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.constants import IGNORE_INDEX
from llava.data.dataset import SFTDataset
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
