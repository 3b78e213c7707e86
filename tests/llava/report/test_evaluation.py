"""The routing log on disk; what lmms-eval's runs wrote, and whether it is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.report.evaluation import (
    RequestRecord,
    find_missing,
    format_table,
    leaf_tasks,
    main,
    rank_path,
    read_metrics,
    read_routing_log,
    read_run,
    remove_routing_log,
    write_routing_log,
)

RESULTS = {
    "results": {
        "gqa": {"alias": "gqa", "exact_match,none": 0.6, "exact_match_stderr,none": 0.1},
        "bench": {"alias": "bench"},
        "bench_dev": {"alias": " - bench_dev", "gpt_eval_score,none": 64.0, "submission,none": None},
        "bench_test": {"alias": " - bench_test", "submission,none": None},
    },
    "group_subtasks": {"gqa": [], "bench": ["bench_dev", "bench_test"]},
    "n-samples": {name: {"original": 9, "effective": 2} for name in ("gqa", "bench_dev", "bench_test")},
}


def write_run(folder: Path, tasks: tuple[str, ...] = ("gqa", "bench_dev", "bench_test"), num_samples: int = 2) -> Path:
    model = folder / "tiny"
    model.mkdir(parents=True)
    (model / "d_results.json").write_text(json.dumps(RESULTS))
    for task in tasks:
        lines = [json.dumps({"doc_id": doc_id}) + "\n" for doc_id in range(num_samples)]
        (model / f"d_samples_{task}.jsonl").write_text("".join(lines))
    records = [RequestRecord("gqa", 0, None, None, 1, [1, 0, 1, 1], 3.0, None, 1, 9, 1, "tiny", 0.3, [1, 0, 1, 1])]
    write_routing_log(folder / "routing.jsonl", records)
    return folder


def test_groups_stand_for_their_members(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    assert leaf_tasks(run, "bench") == ["bench_dev", "bench_test"]
    assert leaf_tasks(run, "gqa") == ["gqa"]
    assert leaf_tasks(run, "mme") == []
    assert read_metrics(run, "bench") == {"bench_dev gpt_eval_score": 64.0}
    assert read_metrics(run, "gqa") == {"gqa exact_match": 0.6}


def test_complete_runs_pass_and_are_laid_out_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "dense")
    write_run(tmp_path / "skip_0.3")
    assert main(["check", "--tasks", "gqa,bench", str(tmp_path / "dense"), str(tmp_path / "skip_0.3")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["dense", "skip_0.3"]
    assert lines[1].split() == ["skip", "rate,", "observed", "0.2500", "0.2500"]
    assert ["gqa", "exact_match", "0.6000", "0.6000"] in [line.split() for line in lines]


@pytest.mark.parametrize(
    ("arguments", "tasks", "sentence"),
    [
        ({}, "gqa,mme", "task mme has no result"),
        ({"tasks": ("bench_dev", "bench_test")}, "gqa", "task gqa has samples of 0 documents, not of 2"),
        ({"num_samples": 1}, "gqa", "task gqa has samples of 1 documents, not of 2"),
        ({"tasks": ("gqa", "bench_dev")}, "bench", "task bench_test has samples of 0 documents, not of 2"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: dict, tasks: str, sentence: str
) -> None:
    run = write_run(tmp_path, **arguments)
    assert sentence in find_missing(read_run(run), tasks.split(","))
    assert main(["check", "--tasks", tasks, str(run)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_run_without_results_or_routing_log_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--tasks", "gqa", str(tmp_path)]) == 2
    assert "lmms-eval exits with 0 even then" in capsys.readouterr().err
    (write_run(tmp_path) / "routing.jsonl").unlink()
    assert main(["check", "--tasks", "gqa", str(tmp_path)]) == 2
    assert "no routing log" in capsys.readouterr().err


def test_a_table_shows_what_a_run_lacks() -> None:
    assert format_table({"a": {"x": 1.0}, "b": {"x": 0.5, "yy": 2.0}}).splitlines() == [
        "         a       b",
        "x   1.0000  0.5000",
        "yy       -  2.0000",
    ]


def make_record(doc_id: int) -> RequestRecord:
    return RequestRecord(
        "digits_vqa", doc_id, "row", 2, 1, [1, 0, 1, 1], 2.5, None, 4, 30, 1, "tiny", 0.25, [1, 0, 1, 1]
    )


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
