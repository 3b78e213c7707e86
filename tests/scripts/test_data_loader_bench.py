"""The loader bench measures whole process trees, reads the same samples both ways, and names what misses its bar."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from llava.data.dataset import SFTDataset
from scripts.bench.bench import Line


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("bench/data_loader.py")


@pytest.fixture
def options(bench, bpe, tmp_path: Path) -> tuple:
    bench.write_images(tmp_path / "images", 2)
    processor = bench.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return (tmp_path / "images", bpe, processor, "v1", 16, 4)


@pytest.fixture(scope="module")
def bpe(bench):
    return bench.make_tokenizer(1000)


def test_both_data_sets_read_the_same_samples(bench, options: tuple, tmp_path: Path) -> None:
    count = bench.write_records(tmp_path / "data.json", 40_000, 2)
    assert len(json.loads((tmp_path / "data.json").read_text())) == count >= 20
    ours, plain = SFTDataset(tmp_path / "data.json", *options), bench.PlainDataset(tmp_path / "data.json", *options)
    assert len(ours) == len(plain) == count
    for index in (0, 9, count - 1):
        expected, found = ours[index], plain[index]
        assert torch.equal(expected["labels"], found["labels"]) and (expected["labels"] != -100).any()
        assert (expected["pixel_values"] is None) == (found["pixel_values"] is None) == (index % 10 == 9)


def hold(pipe) -> None:
    """A child process that holds 64 MB until it is told to end."""
    block = bytearray(b"x" * 64 * 2**20)
    pipe.send(len(block))
    pipe.recv()


def test_the_memory_of_children_is_counted(bench) -> None:
    before = bench.total_pss()
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=hold, args=(theirs,))
    child.start()
    try:
        ours.recv()
        assert 60 < bench.total_pss() - before < 120
    finally:
        ours.send(None)
        child.join()


def test_a_loader_is_timed_and_its_memory_seen(bench, options: tuple, tmp_path: Path) -> None:
    bench.write_records(tmp_path / "data.json", 300_000, 2)
    memory, speed = bench.run_loader(SFTDataset(tmp_path / "data.json", *options), "fork", 1, 80)
    assert memory > 50 and speed > 0


def test_a_missed_bar_is_named_with_exit_status_one(bench, monkeypatch, tmp_path: Path, capsys) -> None:
    lines = [Line("much memory", 2.5, at_most=1.3, unit="x"), Line("less memory", 1.1, at_most=1.3), Line("other", 9.0)]
    monkeypatch.setattr(bench, "measure", lambda *size: lines)
    monkeypatch.setattr(sys, "argv", ["data_loader.py", "--quick", "--check", "--json", str(tmp_path / "numbers.json")])
    with pytest.raises(SystemExit, match="much memory") as stopped:
        bench.main()
    assert "less memory" not in str(stopped.value)
    assert "NOT MET" in capsys.readouterr().out and '"met": false' in (tmp_path / "numbers.json").read_text()
