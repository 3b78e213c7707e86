"""Promises of ``fuzzyroe convert``: it says what it wrote, and a mistake is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from layouts import build_parts, write_original_lora
from llava.cli.app import app
from llava.model.builder import load_checkpoint


def run(*arguments: str | Path):
    """Run the command; stdout and stderr are kept apart."""
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA weights of a language model."""
    folder = tmp_path_factory.mktemp("parts")
    write_original_lora(build_parts(folder), folder / "lora")
    return folder / "lora"


def test_a_conversion_says_what_it_wrote(lora: Path, tmp_path: Path) -> None:
    result = run(lora, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "50KB")
    assert result.exit_code == 0, result.output
    number = len(list((tmp_path / "out").glob("model-*.safetensors")))
    assert f"98 tensors, 0.00 GiB in {number} files, read back equal" in result.stdout
    assert "4 LoRA weights merged" in result.stdout and "448 token ids" in result.stdout
    assert load_checkpoint(tmp_path / "out").routing is None
    back = run(tmp_path / "out", tmp_path / "back", "--to", "original")
    assert back.exit_code == 0 and "384 token ids, none for <image>" in back.stdout


def test_mistakes_are_one_line(lora: Path, tmp_path: Path) -> None:
    for arguments, message in {
        (lora, lora): "exists, and nothing is overwritten",
        (tmp_path / "nowhere", tmp_path / "out"): "name a checkpoint folder",
        (lora, tmp_path / "out", "--to", "hf"): "Layout hf is unknown; transformers and original are known",
    }.items():
        result = run(*arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_estimate_reads_the_sizes_of_every_layout(lora: Path) -> None:
    result = CliRunner().invoke(app, ["estimate", "--stage", "dense", "--model", str(lora)])
    assert result.exit_code == 0 and "decoder 0 M" in result.stdout, "not the 7B of transformers' defaults"
