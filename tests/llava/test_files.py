"""Promises of files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava import files
from llava.files import atomic_write, atomic_write_all, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_not_there_before_the_block_ends(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("whole")
        assert not (tmp_path / "a.txt").exists() and unfinished.suffix == ".txt"
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(error), atomic_write(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("half")
        raise error
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_of_several_files_all_appear_or_none(tmp_path: Path, monkeypatch, fail_at: int) -> None:
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"), atomic_write_all([tmp_path / n for n in "abc"]) as parts:
        for part in parts:
            part.write_text("whole")
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.txt") as first, atomic_write(tmp_path / "a.txt") as second:
        first.write_text("first")
        second.write_text("second")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "first"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask_whatever_library_writes(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.safetensors") as unfinished:
            save_file({"w": torch.ones(2)}, unfinished)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask
    assert load_file(tmp_path / "a.safetensors")["w"].tolist() == [1, 1]


def test_json_is_indented_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"rate": 0.5})
    assert (tmp_path / "a.json").read_text() == '{\n  "rate": 0.5\n}\n'
    assert json.loads((tmp_path / "a.json").read_text()) == {"rate": 0.5}


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "absent" / "a.txt"):
        pass
