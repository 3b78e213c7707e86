"""Files appear whole or not at all."""

from __future__ import annotations

import stat

import pytest

from fuzzyroe.files import atomic_write


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "numbers.txt"
    path.touch()
    mode = path.stat().st_mode
    with atomic_write(path) as unfinished:
        unfinished.write_text("1 2")
        assert path.read_text() == "" and unfinished.parent == tmp_path
        unfinished.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert [file.name for file in tmp_path.iterdir()] == ["numbers.txt"]
    assert path.read_text() == "1 2" and path.stat().st_mode == mode


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_write(path) as unfinished:
        unfinished.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
