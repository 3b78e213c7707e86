"""Input that no stage can run on: how each kind is made, and what a user is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launching import ROOT
from tiny_training import Tiny

IMAGE_RECORD = 1
"""Index of a record with an image in the tiny data."""


@dataclass(frozen=True)
class BadInput:
    """One kind of bad input.

    Attributes:
        changes: Given the tiny checkpoint and an empty folder, the flags that differ from those of a good run.
        message: What the user is told, as regular expression over words separated by single spaces.
    """

    changes: Callable[[Tiny, Path], dict[str, object]]
    message: str


def edited(edit: Callable[[dict], object]) -> Callable[[Tiny, Path], dict[str, object]]:
    """The tiny data with one record changed."""

    def change(tiny: Tiny, folder: Path) -> dict[str, object]:
        records = json.loads(tiny.data.read_text())
        edit(records[IMAGE_RECORD])
        (folder / "data.json").write_text(json.dumps(records))
        return {"data_path": folder / "data.json"}

    return change


def broken_json(tiny: Tiny, folder: Path) -> dict[str, object]:
    """An array in which a colon is missing on line 3."""
    good = json.dumps(json.loads(tiny.data.read_text())[0])
    (folder / "data.json").write_text(f'[\n{good},\n{{"id" "1"}}\n]\n')
    return {"data_path": folder / "data.json"}


def empty_image(tiny: Tiny, folder: Path) -> dict[str, object]:
    """A record whose image file has no bytes."""
    record = json.loads(tiny.data.read_text())[IMAGE_RECORD]
    image = folder / "images" / record["image"]
    image.parent.mkdir(parents=True)
    image.touch()
    (folder / "data.json").write_text(json.dumps([record] * 16))
    return {"data_path": folder / "data.json", "image_folder": folder / "images"}


def zero3(edit: Callable[[dict], object]) -> Callable[[Tiny, Path], dict[str, object]]:
    """The shipped ZeRO-3 configuration, changed."""

    def change(tiny: Tiny, folder: Path) -> dict[str, object]:
        config = json.loads((ROOT / "scripts" / "zero3.json").read_text())
        edit(config)
        (folder / "zero.json").write_text(json.dumps(config))
        return {"deepspeed": folder / "zero.json"}

    return change


def output_below_a_file(tiny: Tiny, folder: Path) -> dict[str, object]:
    """An output folder where nobody can make one, root included."""
    (folder / "file").touch()
    return {"output_dir": folder / "file" / "output"}


def few_records(tiny: Tiny, folder: Path) -> dict[str, object]:
    """Fewer records than calibration needs."""
    (folder / "data.json").write_text(json.dumps(json.loads(tiny.data.read_text())[:4]))
    return {"data_path": folder / "data.json"}


def answer(value: str) -> Callable[[dict], object]:
    """Replace the first answer."""
    return lambda record: record["conversations"][1].update(value=value)


DATA: dict[str, BadInput] = {
    "missing json": BadInput(lambda tiny, folder: {"data_path": folder / "none.json"}, r"none\.json does not exist"),
    "broken json": BadInput(broken_json, r"line 3, column \d+"),
    "missing image": BadInput(
        edited(lambda record: record.update(image="single/none.png")), r"record 1 \(id .*none\.png"
    ),
    "empty image": BadInput(empty_image, r"record 0 \(id .*(empty|zero bytes)"),
    "wrong roles": BadInput(
        edited(lambda record: record["conversations"][0].update({"from": "user"})),
        r"record 1 \(id .*conversations\[0\] is from 'user'",
    ),
    "no answer": BadInput(
        edited(lambda record: record["conversations"].pop()), r"record 1 \(id .*question without an answer"
    ),
    "empty answer": BadInput(edited(answer(" ")), r"record 1 \(id .*the answer conversations\[1\] is empty"),
    "image tag in an answer": BadInput(edited(answer("<image>")), r"record 1 \(id .*only questions may hold"),
    "more images than tags": BadInput(
        edited(lambda record: record.update(image=[record["image"]] * 2)), r"record 1 \(id .*1 '<image>' .* 2 image"
    ),
    "a tag without an image": BadInput(
        edited(lambda record: record.pop("image")), r"record 1 \(id .*1 '<image>' .* but no 'image'"
    ),
    "unknown template": BadInput(lambda tiny, folder: {"version": "v9"}, r"template 'v9' is unknown; .*llava_v1"),
}
"""Found without looking at the model, by the stage scripts before anything is launched."""

STAGE: dict[str, BadInput] = {
    "unknown stage": BadInput(
        lambda tiny, folder: {"stage": "alignment"}, r"Stage 'alignment' is unknown; .*adapter, finetune"
    ),
    "model folder missing": BadInput(
        lambda tiny, folder: {"model_name_or_path": folder / "no_model"}, r"no_model .*name a checkpoint folder"
    ),
    "optimizer in the zero json": BadInput(
        zero3(lambda config: config.update(optimizer={"type": "AdamW"})), r"zero\.json has an 'optimizer' entry"
    ),
    "no gathering in the zero json": BadInput(
        zero3(lambda config: config["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save")),
        r"set zero_optimization\.stage3_gather_16bit_weights_on_model_save to true",
    ),
    "output below a file": BadInput(output_below_a_file, r"file is a file, --output_dir"),
    "few records": BadInput(few_records, r"would calibrate on 4 samples .*at least 8"),
}
"""Found by llava/train/train.py before it loads a model."""
