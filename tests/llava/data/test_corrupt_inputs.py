"""Whatever is corrupt is found before training, each kind with a message of its own; what is left can be trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from corrupt_inputs import BAD_FILES, BAD_IMAGES, BAD_OBJECTS, DAMAGED_IMAGES, TEXT_ONLY
from llava.conversation import get_template
from llava.data.check import DataError, check_data
from llava.data.dataset import SFTDataset
from llava.data.preprocess import LengthMeter

MAX_LENGTH = 250  # the system prompt of v1 takes a good hundred of the tiny tokenizer's tokens


def talk(question: str, image: str | list[str] | None = None) -> dict:
    """A record of one turn."""
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {"id": "r", "conversations": messages} | ({} if image is None else {"image": image})


BAD_LENGTHS = {
    "image beyond the maximum": (talk("<image>\n" * 20, ["coco/good.jpg"] * 20), "The image tokens end at position"),
    "answer beyond the maximum": (talk("why " * 300), f"no answer lies within {MAX_LENGTH} tokens"),
}
# the first is a file's content here, told as such; the second is the first by another road
ELSEWHERE = {"a list", "blank"}
RECORDS = {kind: case for kind, case in {**BAD_OBJECTS, **BAD_LENGTHS}.items() if kind not in ELSEWHERE}
FILES = {kind: case for kind, case in BAD_FILES.items() if kind not in ELSEWHERE}
IMAGES = {**BAD_IMAGES, **DAMAGED_IMAGES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with one good image."""
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "coco" / "good.jpg")
    return folder


@pytest.fixture
def meter(bpe_tokenizer) -> LengthMeter:
    return LengthMeter(bpe_tokenizer, get_template("v1"), 16, 4, MAX_LENGTH)


def lines(folder: Path, *records: object) -> Path:
    """A JSON Lines file of a good record, then the given ones."""
    path = folder.with_name("data.jsonl")
    path.write_text("\n".join(json.dumps(record) for record in (TEXT_ONLY, *records)))
    return path


def explain(path: Path, folder: Path, meter: LengthMeter, decode: bool = False) -> str:
    """What the check says, without the name of file and record."""
    try:
        report = check_data(path, folder, meter=meter, allow_truncation=True, decode=decode)
        report.raise_if_bad()
    except DataError as error:
        said = str(error).splitlines()[-1]
        return re.sub(r"^.*?record \d+ \(id .*?\): ", "", said).replace(str(path), "FILE")
    return ""


def make_image(kind: str, folder: Path) -> None:
    """Put the image of that kind where its record looks for it."""
    IMAGES[kind][0](folder / "coco" / "1.jpg")


@pytest.mark.parametrize("kind", RECORDS)
def test_a_corrupt_record_is_found_before_training_and_the_rest_can_be_read(
    kind: str, folder: Path, meter: LengthMeter, image_processor
) -> None:
    record, message = RECORDS[kind]
    path = lines(folder, record)
    assert re.search(message, explain(path, folder, meter))
    good = check_data(path, folder, meter=meter, allow_truncation=True, on_missing="drop").usable_path
    dataset = SFTDataset(good, folder, meter.tokenizer, image_processor, "v1", 16, 4, MAX_LENGTH)
    assert [len(sample["input_ids"]) > 0 for sample in dataset] == [True]


@pytest.mark.parametrize("kind", FILES)
def test_a_corrupt_file_is_found_before_training(kind: str, folder: Path, meter: LengthMeter) -> None:
    content, message = FILES[kind]
    path = folder.with_name("data.json")
    path.write_bytes(content)
    assert re.search(message, explain(path, folder, meter))


@pytest.mark.parametrize("kind", IMAGES)
def test_a_corrupt_image_is_found_before_training_and_the_rest_can_be_read(
    kind: str, folder: Path, meter: LengthMeter, image_processor
) -> None:
    make_image(kind, folder)
    path = lines(folder, talk("<image>\nIs it?", "coco/1.jpg"), talk("<image>\nIs it?", "coco/good.jpg"))
    needs_decoding = kind in DAMAGED_IMAGES
    report = check_data(path, folder, meter=meter, decode=needs_decoding)
    assert [state.value for state in report.bad_images.values()] == [IMAGES[kind][1]]
    assert report.missing_list.read_text() == f"coco/1.jpg\t{IMAGES[kind][1]}\n"
    assert re.search(IMAGES[kind][2], explain(path, folder, meter, needs_decoding))
    good = check_data(path, folder, meter=meter, decode=needs_decoding, on_missing="drop").usable_path
    dataset = SFTDataset(good, folder, meter.tokenizer, image_processor, "v1", 16, 4, MAX_LENGTH)
    assert [sample["pixel_values"] is None for sample in dataset] == [True, False]


def test_no_two_kinds_share_a_message(folder: Path, meter: LengthMeter) -> None:
    found = {kind: explain(lines(folder, record), folder, meter) for kind, (record, _) in RECORDS.items()}
    for kind, (content, _) in FILES.items():
        path = folder.with_name("data.json")
        path.write_bytes(content)
        found[f"file: {kind}"] = explain(path, folder, meter)
    for number, kind in enumerate(IMAGES):
        images = folder.with_name(f"images{number}")
        (images / "coco").mkdir(parents=True)
        make_image(kind, images)
        said = explain(lines(images, talk("<image>\nIs it?", "coco/1.jpg")), images, meter, decode=True)
        found[f"image: {kind}"] = said.replace(str(images), "IMAGES")
    assert all(found.values()) and len(found) >= 70
    kinds: dict[str, list[str]] = {}
    for kind, said in found.items():
        kinds.setdefault(re.sub(r"byte 0x\w+|line \d+|column \d+", "", said), []).append(kind)
    assert not {said: shared for said, shared in kinds.items() if len(shared) > 1}
