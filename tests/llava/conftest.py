"""Two tiny tokenizers, a tiny LLaVA that reads their ids, and a folder of records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.data.dataset import SFTDataset
from playground.digits.tokenizer import train_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER", "ASSISTANT", ":", *(f"w{number}" for number in range(24))]


def record(name: str, *messages: str, image: str | None = None) -> dict:
    """One record of the LLaVA format; messages are questions and answers in turn."""
    speakers = ("human", "gpt")
    conversations = [{"from": speakers[i % 2], "value": message} for i, message in enumerate(messages)]
    return {"id": name, "conversations": conversations} | ({} if image is None else {"image": image})


RECORDS = [
    record("one", "<image>\nWhich digit is in the middle?", "seven", image="red.png"),
    record("two", "<image>\nHow many?", "4", "And below, in the third row of the page?", "none", image="blue.png"),
    record("text", "Add two and five.", "7"),
    record("long", "<image>\nRead every digit of every row, from left to right.", "1 2 3 4", image="blue.png"),
    record("talk", "Say hello to all of them.", "hello", "Again, but louder!", "HELLO", "Once more", "no"),
    record("plain", "<image>\nWhat colour is it?", "red", image="red.png"),
]


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word (``w0`` has id 8), ``<s>`` in front; ids are the positions in ``WORDS``."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer built like Llama's, trained on the spot on a few records; ``<image>`` has id 4."""
    return train_tokenizer(RECORDS, 160)


@pytest.fixture
def image_processor() -> CLIPImageProcessorPil:
    """The processor of the tiny vision tower, 32 px."""
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def reading_llava(
    tiny_llava: LlavaForConditionalGeneration, bpe_tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """The tiny LLaVA with the vocabulary of ``bpe_tokenizer``; 16 image tokens per image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_llava.resize_token_embeddings(len(bpe_tokenizer), mean_resizing=False)
    tiny_llava.config.image_token_id = bpe_tokenizer.convert_tokens_to_ids("<image>")
    return tiny_llava


@pytest.fixture
def record_folder(tmp_path: Path) -> Path:
    """``records.json`` with two images beside it, neither of them square."""
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    Image.linear_gradient("L").resize((32, 64)).save(tmp_path / "blue.png")
    return tmp_path


@pytest.fixture
def sft_dataset(
    record_folder: Path, bpe_tokenizer: PreTrainedTokenizerFast, image_processor: CLIPImageProcessorPil
) -> SFTDataset:
    """``RECORDS`` under the template of the digits, 16 image tokens per image."""
    return SFTDataset(
        record_folder / "records.json", record_folder, bpe_tokenizer, image_processor, "digits", 16, 4, max_length=256
    )
