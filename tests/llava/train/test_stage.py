"""Promises of setting a stage up: what is saved tells evaluation how training prepared its images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.data.dataset import SFTCollator
from llava.mm_utils import process_images
from llava.model.builder import Checkpoint
from llava.model.families import choose_template
from llava.train.arguments import Arguments, DataArguments, LlavaTrainingArguments, ModelArguments, StageArguments
from llava.train.stage import build_trainer
from llava.train.stages import STAGES


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_evaluation_prepares_images_as_training_did(
    reading_llava, bpe_tokenizer, image_processor, record_folder: Path, aspect: str
) -> None:
    checkpoint = Checkpoint(reading_llava, bpe_tokenizer, image_processor, "memory", "memory", None)
    trainer = build_trainer(
        STAGES["dense"],
        checkpoint,
        Arguments(
            ModelArguments("memory", version="digits"),
            DataArguments(str(record_folder / "records.json"), str(record_folder), image_aspect_ratio=aspect),
            StageArguments(),
            LlavaTrainingArguments(output_dir=str(record_folder / "output"), use_cpu=True),
        ),
    )
    config = type(reading_llava.config).from_dict(reading_llava.config.to_dict())  # as saved and loaded again
    with Image.open(record_folder / "blue.png") as image:
        expected = process_images([image], image_processor, config)
    assert torch.equal(trainer.train_dataset[1]["pixel_values"], expected)
    assert choose_template(None, config, "--version")[0] == "digits"  # a chat, too, renders prompts as training did
    assert isinstance(trainer.data_collator, SFTCollator)
