"""The routing log on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.report.routing_log import RequestRecord, rank_path, read_routing_log, remove_routing_log, write_routing_log


def make_record(doc_id: int) -> RequestRecord:
    return RequestRecord("digits_vqa", doc_id, "row", 2, 1, [1, 0, 1, 1], 2.5, None, 4, 30, 1, "tiny", 0.25)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    records = [make_record(1), make_record(0)]
    write_routing_log(path, records)
    assert read_routing_log(path) == records
    assert records[0].skip_rate == 0.25
    assert [file.name for file in tmp_path.iterdir()] == ["routing.jsonl"]


def test_the_files_of_all_processes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    for rank in (1, 0):
        write_routing_log(path, [make_record(rank)], rank, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"routing.rank{rank}-of-2.jsonl" for rank in (0, 1)]
    assert [record.doc_id for record in read_routing_log(path)] == [0, 1]


def test_a_log_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    with pytest.raises(FileNotFoundError, match="no routing log"):
        read_routing_log(path)
    write_routing_log(path, [make_record(0)], 0, 3)
    write_routing_log(path, [make_record(2)], 2, 3)
    with pytest.raises(FileNotFoundError, match="lacks routing.rank1-of-3.jsonl"):
        read_routing_log(path)
    write_routing_log(path, [make_record(1)], 1, 3)
    write_routing_log(path, [make_record(0)])
    with pytest.raises(ValueError, match="several runs"):
        read_routing_log(path)


def test_removing_a_log_removes_the_files_of_all_its_processes(tmp_path: Path) -> None:
    path, other = tmp_path / "routing.jsonl", tmp_path / "other.rank0-of-2.jsonl"
    other.write_text("")
    write_routing_log(path, [])
    write_routing_log(path, [], 3, 4)
    remove_routing_log(path)
    assert list(tmp_path.iterdir()) == [other]
    remove_routing_log(path)


def test_lines_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    path.write_text('{"task": "digits_vqa"}\n')
    with pytest.raises(ValueError, match="has keys"):
        read_routing_log(path)


def test_one_process_writes_the_path_itself(tmp_path: Path) -> None:
    assert rank_path(tmp_path / "a.jsonl", 0, 1) == tmp_path / "a.jsonl"
