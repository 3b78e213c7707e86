"""From a run's files to ``evaluation.json``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava.report.evaluation import RequestRecord, collect, load_evaluation, main, write_routing_log

RECORDS = [
    RequestRecord("digits_vqa", 0, "row", 2, 1, [1, 1, 1, 1], 4.0, 2.0, 2, 30, 3, "tiny", 0.25, [1, 1, 1, 1]),
    RequestRecord("digits_vqa", 1, "row", 2, 1, [1, 0, 1, 0], 2.0, 2.0, 2, 30, 3, "tiny", 0.25, [1, 0, 1, 0]),
    RequestRecord("digits_vqa", 2, "parity", 1, 1, [1, 0, 1, 1], 6.0, None, 1, 28, 1, "tiny", 0.25, [1, 0, 1, 1]),
    RequestRecord("digits_vqa", 3, "spoken_sum", 1, 0, [1, 0, 0, 0], 1.0, 4.0, 1, 12, 2, "tiny", 0.25, [1, 0, 0, 0]),
]
CORRECT = [1.0, 0.0, 1.0, 0.0]


def write_run(folder: Path, records: list[RequestRecord] = RECORDS, doc_ids: tuple[int, ...] = (0, 1, 2, 3)) -> Path:
    """Write what an evaluation leaves; the folder's routing log."""
    model = folder / "tiny"
    model.mkdir(parents=True)
    (model / "20260101_results.json").write_text(json.dumps({"results": {"digits_vqa": {"exact_match,none": 0.5}}}))
    lines = []
    for doc_id in doc_ids:
        metric = "exact_match_text_only" if doc_id == 3 else "exact_match"
        lines.append(json.dumps({"doc_id": doc_id, "filtered_resps": "one", metric: CORRECT[doc_id]}) + "\n")
    (model / "20260101_samples_digits_vqa.jsonl").write_text("".join(lines))
    write_routing_log(folder / "routing.jsonl", records)
    return folder / "routing.jsonl"


def test_accuracy_and_skip_rate_are_joined_by_document(tmp_path: Path) -> None:
    log = write_run(tmp_path, RECORDS[::-1])
    evaluation = collect(tmp_path, log, "ours", 4)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    assert evaluation == {
        "label": "ours",
        "checkpoint": "tiny",
        "target_skip_ratio": 0.25,
        "items": 4,
        "accuracy": {
            "all": 0.5,
            "image": pytest.approx(2 / 3),
            "text_only": 0.0,
            "types": {"parity": 1.0, "row": 0.5, "spoken_sum": 0.0},
        },
        "skip_rate": {
            "all": pytest.approx((0 + 0.5 + 0.25 + 0.75) / 4),
            "image": pytest.approx((0 + 0.5 + 0.25) / 3),
            "decode": pytest.approx((0 + 0.5 + 0.25 + 0.75) / 4),
            "types": {"parity": 0.25, "row": 0.25, "spoken_sum": 0.75},
            "layers": [0, 0.75, 0.25, 0.5],
            "layers_by_type": {"parity": [0, 1, 0, 0], "row": [0, 0.5, 0, 0.5], "spoken_sum": [0, 1, 1, 1]},
        },
        "prefill_ms": 3.0,
        "decode_ms_per_token": 2.0,
        "batch_size": 2,
        "correct": {"0": 1, "1": 0, "2": 1},
        "complexity": {
            "1": {"items": 1, "accuracy": 1.0, "skip_rate": 0.25},
            "2": {"items": 2, "accuracy": 0.5, "skip_rate": 0.25},
        },
    }


def test_layers_that_ran_again_count_in_the_prefill_and_not_in_decoding(tmp_path: Path) -> None:
    escalated = [replace(record, kept_layers=[1] * 4, prefill_runs=[1, 1, 2, 2]) for record in RECORDS[:2]]
    assert escalated[0].skip_rate == -0.5 and escalated[0].decode_skip_rate == 0
    evaluation = collect(tmp_path, write_run(tmp_path, [*escalated, *RECORDS[2:]]), "ours", 4)
    skip_rate = load_evaluation(tmp_path / "evaluation.json").skip_rate
    assert skip_rate == evaluation["skip_rate"] and skip_rate["types"]["row"] == -0.5
    assert skip_rate["all"] == pytest.approx((-0.5 - 0.5 + 0.25 + 0.75) / 4)
    assert skip_rate["decode"] == pytest.approx((0 + 0 + 0.25 + 0.75) / 4)


def test_a_dense_run_of_single_tokens_is_collected(tmp_path: Path) -> None:
    dense = [
        replace(r, kept_layers=[1] * 4, prefill_runs=[1] * 4, target_skip_ratio=None, decode_ms_per_token=None)
        for r in RECORDS
    ]
    evaluation = collect(tmp_path, write_run(tmp_path, dense), "dense", 4)
    assert evaluation["target_skip_ratio"] is None
    assert evaluation["skip_rate"]["all"] == 0
    assert evaluation["decode_ms_per_token"] is None


@pytest.mark.parametrize(
    ("records", "doc_ids", "expected", "match"),
    [
        (RECORDS, (0, 1, 2), 4, "samples|holds 3 items, 4 were expected"),
        (RECORDS[:3], (0, 1, 2, 3), 4, "routing.jsonl holds 3 items, 4 were expected"),
        (RECORDS, (0, 1, 2, 3), 5, "holds 4 items, 5 were expected"),
        (RECORDS, (0, 1, 2, 2), 4, r"holds documents \[2\] more than once"),
        ([*RECORDS, RECORDS[0]], (0, 1, 2, 3), 4, r"holds documents \[0\] more than once"),
        ([*RECORDS[:3], replace(RECORDS[3], doc_id=9)], (0, 1, 2, 3), 4, r"knows nothing of documents \[3\]"),
        ([*RECORDS[:3], replace(RECORDS[3], checkpoint="x")], (0, 1, 2, 3), 4, "mixes the values .* of checkpoint"),
    ],
)
def test_items_that_do_not_add_up_are_refused(
    tmp_path: Path, records: list, doc_ids: tuple, expected: int, match: str
) -> None:
    log = write_run(tmp_path, records, doc_ids)
    with pytest.raises(ValueError, match=match):
        collect(tmp_path, log, "ours", expected)
    assert not (tmp_path / "evaluation.json").exists()


def test_the_command_line_exits_with_2_when_results_are_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["collect", str(tmp_path), "--label", "ours", "--items", "4"]
    assert main(arguments) == 2
    assert "holds no *_results.json" in capsys.readouterr().err
    write_run(tmp_path)
    assert main(arguments) == 0
    assert "accuracy 0.5000, skip rate 0.3750" in capsys.readouterr().out
    (tmp_path / "tiny" / "20260102_results.json").write_text("{}")
    assert main(arguments) == 2
    assert "results of 2 runs" in capsys.readouterr().err


def test_another_task_is_refused(tmp_path: Path) -> None:
    log = write_run(tmp_path)
    samples = tmp_path / "tiny" / "20260101_samples_digits_vqa.jsonl"
    samples.write_text("".join(json.dumps({"doc_id": doc_id, "mme_score": 1}) + "\n" for doc_id in range(4)))
    with pytest.raises(ValueError, match="none of the metrics exact_match"):
        collect(tmp_path, log, "ours", 4)
    samples.with_name("20260101_samples_mme.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"samples of 2 tasks \(digits_vqa, mme\)"):
        collect(tmp_path, log, "ours", 4)
