#!/usr/bin/env python
"""Host memory and speed of the training data loader over a synthetic SFT file, beside a plain json.load dataset.

    python scripts/bench/data_loader.py --check --json data_loader.json    a file of 1 GB, some minutes
    python scripts/bench/data_loader.py --quick                            100 MB, under a minute

Memory is the sum of PSS (proportional set size) over the process tree: main process, fork server, workers. Page cache
is not in it. Workers are started by Python's fork server, a fresh process that has imported the code and holds none of
the data; they get the data set by pickle, so nothing of the main process is shared with them. Workers started by
"spawn" stand beside that: each of them imports torch and transformers on its own, whatever the data. Samples have one
image of 336 x 336, or none, and are tokenized with 32,000 tokens. The plain data set, LLaVA's way, holds all records
as Python objects; it is measured on 100 MB at most, since every worker unpickles a copy.

With --check the exit status is 1 if a bar is not met, and its line is named.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import psutil
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.data import FORK_SERVER_MODULES
from llava.data.dataset import SFTCollator, SFTDataset
from llava.data.records import parse_record
from scripts.bench.bench import Line, conditions, make_parser, report

FEW, MANY = 1, 4
"""Workers that are compared."""

BAR = 1.3
PLAIN_BYTES = 100_000_000
MEGABYTE = 2**20
WORDS = tuple("".join(letters) for letters in itertools.product("bdklmnrst", "aeiou", "lmnrst", "aeiou"))


class PlainRecords(list):
    """All records of a file as Python objects, read like a ``RecordFile``."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text(encoding="utf-8")))
        self.path = path

    def __getitem__(self, index: int) -> Any:
        return parse_record(super().__getitem__(index), index, self.path)


class PlainDataset(SFTDataset):
    """The same samples from records that were all parsed at once."""

    def __init__(self, path: Path, *options: Any) -> None:
        super().__init__(path, *options)
        self.records = PlainRecords(path)


def write_records(path: Path, num_bytes: int, num_images: int) -> int:
    """Write an SFT array of about some bytes; nine records in ten have an image. Gives the number of records."""
    generator, count, written = random.Random(0), 0, 0
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(20, 60))) for _ in range(4096)]
    with open(path, "w", encoding="utf-8") as handle:
        handle.write("[\n")
        while written < num_bytes:
            turns = [generator.choice(texts) for _ in range(8)]
            has_image = count % 10 != 9
            turns[0] = f"<image>\n{turns[0]}" if has_image else turns[0]
            messages = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
            record = {"id": f"{count:012}", "conversations": messages}
            if has_image:
                record["image"] = f"coco/{count % num_images:03}.jpg"
            written += handle.write((",\n" if count else "") + json.dumps(record))
            count += 1
        handle.write("\n]\n")
    return count


def write_images(folder: Path, number: int) -> None:
    """Write images of LLaVA-1.5's size."""
    (folder / "coco").mkdir(parents=True)
    for index in range(number):
        Image.effect_noise((336, 336), 60).convert("RGB").save(folder / "coco" / f"{index:03}.jpg", quality=80)


def make_tokenizer(size: int = 32_000) -> PreTrainedTokenizerFast:
    """A tokenizer with as many tokens and merges as Llama's."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["<unk>", "<s>", "</s>", "<pad>", *map(chr, range(0x20, 0x7F)), "\n", "▁"]
    merges: list[tuple[str, str]] = []
    words = map("".join, itertools.chain(*(itertools.product(*[letters] * length) for length in (2, 3, 4))))
    for word in itertools.islice(words, size - len(vocabulary)):
        merges.append((word[:-1], word[-1]))
        vocabulary.append(word)
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def total_pss() -> float:
    """PSS of this process and all below it, in MB."""
    here = psutil.Process()
    return sum(process.memory_full_info().pss for process in (here, *here.children(recursive=True))) / MEGABYTE


def run_loader(dataset: Dataset, method: str, num_workers: int, num_samples: int) -> tuple[float, float]:
    """Read samples in random order; most memory seen in MB, and samples per second once the first batch is there."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:num_samples].tolist()
    workers = {"num_workers": num_workers, "multiprocessing_context": method}
    loader = DataLoader(dataset, batch_size=8, sampler=order, collate_fn=SFTCollator(3), **workers)
    most, batches = 0.0, iter(loader)
    next(batches)
    started = time.perf_counter()
    for number, _ in enumerate(batches, start=1):
        if number % 8 == 0:
            paused = time.perf_counter()
            most = max(most, total_pss())
            started += time.perf_counter() - paused
    speed = (len(order) - loader.batch_size) / (time.perf_counter() - started)
    return most, speed


def compare(
    name: str, dataset: Dataset, num_samples: int, method: str = "forkserver", bar: float | None = None
) -> Iterator[Line]:
    """One worker and several over the same samples."""
    few, many = (run_loader(dataset, method, number, num_samples) for number in (FEW, MANY))
    yield Line(f"{name}: PSS of {MANY} workers by that of {FEW}", many[0] / few[0], at_most=bar, unit="x")
    for number, (memory, speed) in ((FEW, few), (MANY, many)):
        yield Line(f"  workers: {number}", memory, unit=" MB")
        yield Line(f"  workers: {number}, speed", speed, unit=" samples/s")


def measure(num_bytes: int, num_samples: int, with_spawn: bool) -> Iterator[Line]:
    """All lines, over a file of some bytes made in a temporary folder."""
    multiprocessing.set_forkserver_preload(FORK_SERVER_MODULES)
    with tempfile.TemporaryDirectory(prefix="data_loader_") as name:
        folder = Path(name)
        write_images(folder / "images", 64)
        count = write_records(folder / "data.json", num_bytes, 64)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
        options = (folder / "images", make_tokenizer(), processor, "v1", 576, 4)
        started = time.perf_counter()
        dataset = SFTDataset(folder / "data.json", *options)
        indexed = time.perf_counter()
        dataset.modality_lengths()
        size = f"{count:,} records of {num_bytes / 1e6:,.0f} MB"
        yield Line(f"indexing {size}", indexed - started, unit=" s")
        yield Line("lengths of all records for the sampler", time.perf_counter() - indexed, unit=" s")
        yield from compare("records on disk, fork server", dataset, num_samples, bar=BAR)
        if with_spawn:
            yield from compare("records on disk, spawn", dataset, num_samples, "spawn")
        plain = folder / "data.json"
        if num_bytes > PLAIN_BYTES:
            plain = folder / "plain.json"
            write_records(plain, PLAIN_BYTES, 64)
        size = f"{plain.stat().st_size / 1e6:,.0f} MB"
        yield from compare(f"json.load of {size}, fork server", PlainDataset(plain, *options), num_samples)


def main() -> None:
    """Measure, print, check."""
    arguments = make_parser(__doc__, "a file of 100 MB, fewer samples, no spawn").parse_args()
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    torch.set_num_threads(1)
    size = (100_000_000, 256, False) if arguments.quick else (1_000_000_000, 320, True)
    report(arguments, measure(*size), conditions(what="workers at batch 8, PSS of the process tree"))


if __name__ == "__main__":
    main()
