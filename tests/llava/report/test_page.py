"""Promises of the closing report: numbers, tables, page."""

from __future__ import annotations

import json
import math
import re

import pytest

from fuzzyroe.plots import (
    LIGHT,
    SkipPoint,
    draw_accuracy,
    draw_bars,
    draw_control_surface,
    draw_layer_skips,
    draw_lines,
    render_svg,
)
from fuzzyroe.rules.yaml_io import load_rule_base, save_rule_base
from llava.report.comparison import (
    complexity_table,
    duration,
    load_report,
    milliseconds,
    report_tables,
    runs_table,
    stages_table,
    to_json,
    types_table,
)
from llava.report.evaluation import load_evaluation
from llava.report.page import MAX_POINTS, render_stage, report_figures, thin_out, write_report, write_stage_page


def evaluation(label: str, correct: list[int], target: float | None = None, **changes) -> dict:
    """A result file over image questions a, b, ... and two text questions that are answered correctly."""
    mean = sum(correct) / len(correct)
    skip = target or 0.0
    return {
        "label": label,
        "checkpoint": f"runs/{label}",
        "target_skip_ratio": target,
        "items": len(correct) + 2,
        "accuracy": {"all": 0.9, "image": mean, "text_only": 1.0, "types": {"count": mean, "spoken": 1.0}},
        "skip_rate": {
            "all": skip,
            "image": skip,
            "types": {"count": skip, "spoken": skip},
            "layers": [0.0, skip],
            "layers_by_type": {"count": [0.0, skip], "spoken": [0.0, 1.0 if target else 0.0]},
        },
        "prefill_ms": 20.0 * (1 - skip),
        "decode_ms_per_token": 3.0,
        "batch_size": 4,
        "correct": {chr(ord("a") + index): value for index, value in enumerate(correct)},
        "complexity": {"2": {"items": 4, "accuracy": mean, "skip_rate": skip}},
        **changes,
    }


BASE = evaluation("base", [1, 1, 0, 0])
TUNED = evaluation("tuned", [1, 1, 1, 0])
ROUTED = evaluation("routed", [1, 0, 1, 0], 0.5)


@pytest.fixture
def write(tmp_path):
    """A function that writes result files and gives their paths."""

    def write_files(*contents: dict) -> list:
        paths = [tmp_path / f"{number}.json" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_text(json.dumps(content))
        return paths

    return write_files


@pytest.fixture
def stage(tmp_path):
    """An output folder of a router stage."""
    folder = tmp_path / "router"
    folder.mkdir()
    facts = {"stage": "router", "samples": 1111, "engine": "DeepSpeedEngine", "zero_stage": 3, "world_size": 2}
    (folder / "stage.json").write_text(json.dumps({**facts, "seconds": 67.2, "calibration": {"examples": 300}}))
    save_rule_base(load_rule_base("default").interpolate(), folder / "rule_base.yaml")
    return folder


def test_reference_is_the_better_dense_run(write):
    report = load_report(write(ROUTED, BASE, TUNED))
    assert report.reference.label == "tuned"
    assert [(row.run.label, row.is_reference) for row in report.rows] == [
        ("base", False),
        ("tuned", True),
        ("routed", False),
    ]


def test_rows_compare_with_the_reference(write):
    base, tuned, routed = load_report(write(BASE, TUNED, ROUTED)).rows
    assert tuned.difference is None and tuned.prefill_ratio == 1.0
    assert (routed.run.target_skip_ratio, routed.run.image_skip_rate, routed.prefill_ratio) == (0.5, 0.5, 0.5)
    assert (routed.difference.num_gained, routed.difference.num_lost) == (0, 1)
    assert routed.difference.difference == pytest.approx(-0.25) and base.difference.num_lost == 1


def test_times_of_other_batch_sizes_are_not_compared(write):
    rows = load_report(write(TUNED, {**ROUTED, "batch_size": 1})).rows
    assert rows[1].prefill_ratio is None and rows[1].run.prefill_ms == 10.0


def test_routed_runs_are_ordered_by_target(write):
    more = evaluation("less", [1, 0, 1, 0], 0.25)
    assert [row.run.label for row in load_report(write(ROUTED, more, TUNED)).rows] == ["tuned", "less", "routed"]


def test_without_a_dense_run_there_is_nothing_to_compare_with(write):
    with pytest.raises(ValueError, match="None of the 1 runs is dense; at least one is needed"):
        load_report(write(ROUTED))


def test_runs_on_other_questions_are_refused(write):
    other = evaluation("other", [1, 1, 0], 0.5)
    with pytest.raises(ValueError, match=r"1 of 4 questions of .*0.json are not in .*1.json, the first is 'd'"):
        load_report(write(TUNED, other))


def test_a_label_names_one_run(write):
    with pytest.raises(ValueError, match="The label 'tuned' names 2 runs"):
        load_report(write(TUNED, TUNED))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": {"a": 1, "b": 1}}, r"2 answers in 'correct' have mean 1.0000, but accuracy.image is 0.7500"),
        ({"correct": {}}, "has no answer in 'correct'"),
        ({"target_skip_ratio": 30}, r"'target_skip_ratio' is 30.0; a ratio in \[0, 1\] is needed"),
        ({"accuracy": {"all": 0.9}}, "'image' is None; a ratio"),
        ({"prefill_ms": "fast"}, "'prefill_ms' is 'fast'; a number from 0 up"),
        ({"skip_rate": []}, "'skip_rate' is .*; an object is needed"),
    ],
)
def test_broken_result_files_are_refused_by_name(write, changes, message):
    (path,) = write({**TUNED, **changes})
    with pytest.raises(ValueError, match=message) as caught:
        load_evaluation(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_result_is_refused(write, tmp_path):
    with pytest.raises(ValueError, match="has no label, accuracy, correct"):
        load_evaluation(write({"stage": "router"})[0])
    (tmp_path / "cut.json").write_text('{"label": ')
    with pytest.raises(ValueError, match="cut.json is not JSON"):
        load_evaluation(tmp_path / "cut.json")


def test_tables_read_as_written(write, stage):
    report = load_report(write(TUNED, ROUTED), [stage])
    assert runs_table(report).rows == (
        ("tuned", "dense", "0.0 %", "0.0 %", "75.0 %", "reference", "20.0", "3.00", "1.00"),
        ("routed", "50.0 %", "50.0 %", "50.0 %", "50.0 %", "-25.0 [-60.9, +27.6]", "10.0", "3.00", "0.50"),
    )
    assert types_table(report).rows == (
        ("count", "75.0 %", "50.0 % (50.0 %)"),
        ("spoken", "100.0 %", "100.0 % (50.0 %)"),
    )
    assert complexity_table(report).rows == (("2", "75.0 %", "50.0 % (50.0 %)"),)
    assert stages_table(report).rows == (("router", "1 min 07 s", "–", "1,111", "DeepSpeedEngine", "3", "2"),)


def test_stages_may_be_left_out(write):
    tables = report_tables(load_report(write(TUNED, ROUTED)))
    assert [table.columns[0] for table in tables] == ["run", "question type", "complexity"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (45.4, "45 s"), (59.7, "1 min 00 s"), (725, "12 min 05 s"), (12000, "3 h 20 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(None, "–"), (3.14159, "3.14"), (21.04, "21.0"), (1234.56, "1234.6")])
def test_milliseconds_read_well(number, text):
    assert milliseconds(number) == text


def test_report_is_written_whole(write, stage, tmp_path):
    report = load_report(write(BASE, TUNED, ROUTED), [stage])
    files = write_report(report, tmp_path / "out")
    names = ["report.html", "report.json", "accuracy.png", "layers_1.png", "memberships.png", "control_surface.png"]
    assert [path.name for path in files] == names
    data = json.loads(files[1].read_text())
    assert data == json.loads(json.dumps(to_json(report)))
    assert data["reference"] == "tuned" and data["runs"][2]["difference"]["num_lost"] == 1
    assert data["stages"][0]["calibration"] == {"examples": 300} and "correct" not in data["runs"][0]


def test_page_needs_nothing_else(write, stage, tmp_path):
    hostile = {**ROUTED, "label": "<script>alert('x')</script>"}
    page = write_report(load_report(write(TUNED, hostile), [stage]), tmp_path)[0].read_text()
    assert not re.search(r"(src|href|srcset)=['\"](?!data:)", page) and "@import" not in page and "url(" not in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert page.count("<picture>") == 4 and page.count('alt="') == 4


def test_same_report_gives_the_same_page(write, tmp_path):
    report = load_report(write(TUNED, ROUTED))
    first, second = (write_report(report, tmp_path / name)[0].read_bytes() for name in ("one", "two"))
    assert first == second


def test_figures_need_their_data(write):
    report = load_report(write(TUNED, {**ROUTED, "skip_rate": {"all": 0.5, "image": 0.5}}))
    assert list(report_figures(report)) == ["accuracy"]


def test_heat_map_refuses_types_with_other_layers():
    with pytest.raises(ValueError, match=r"The skip rates have \[2, 3\] layers"):
        draw_layer_skips({"count": [0, 1], "row": [0, 1, 0]})


def test_heat_map_shows_every_cell_as_percent():
    texts = [text.get_text() for text in draw_layer_skips({"count": [0.0, 0.314], "row": [1.0, 0.0]}).axes[0].texts]
    assert texts == ["31", "100"]


def test_control_surface_has_a_panel_per_term_of_the_third_variable():
    titles = [axes.get_title() for axes in draw_control_surface(load_rule_base("default").interpolate()).axes]
    assert titles == ["question length: low", "question length: medium", "question length: high", ""]


def test_control_surface_of_an_incomplete_rule_base_is_refused():
    with pytest.raises(ValueError, match="call interpolate"):
        draw_control_surface(load_rule_base("default"))


def test_points_above_each_other_are_numbered_on_both_sides():
    points = [SkipPoint("a", 0.0, 0.8, True), SkipPoint("b", 0.0, 0.81, True), SkipPoint("c", 0.3, 0.7, False)]
    sides = {text.get_text(): text.get_horizontalalignment() for text in draw_accuracy(points).axes[0].texts}
    assert sides == {"1": "right", "2": "left", "3": "left"}


def test_svg_is_reproducible():
    points = [SkipPoint("a", 0.0, 0.8, True)]
    first, second = (render_svg(lambda theme: draw_accuracy(points, theme), LIGHT) for _ in range(2))
    assert first == second and first.lstrip().startswith("<?xml")


def test_charts_hold_their_values_and_refuse_to_be_empty():
    figure = draw_lines({"a<b": [(1, 1.0), (2, math.nan), (3, 2.0)]})
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 1], [3, 2]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a<b"]
    assert [text.get_text() for text in draw_bars({"coco": 0.3}).axes[0].texts] == ["30 %"]
    for call in (lambda: draw_lines({}), lambda: draw_lines({"a": [(1, math.nan)]}), lambda: draw_bars({})):
        with pytest.raises(ValueError, match="draw"):
            call()


def test_a_page_of_a_stage_without_steps_has_no_loss(tmp_path):
    (tmp_path / "stage.json").write_text('{"stage": "router", "moved": {"adapter": true, "router": false}}')
    page = write_stage_page(tmp_path).read_text()
    assert "<h1>Stage router</h1>" in page and "<td>adapter</td>" in page and "<h2>Loss" not in page


def test_a_long_run_is_drawn_with_few_points():
    line = thin_out([(step, 1.0) for step in range(1, 100 * MAX_POINTS)])
    assert len(line) <= MAX_POINTS and line[-1] == (100 * MAX_POINTS - 1, 1.0)
    steps = [{"step": step, "loss": float(step)} for step in range(1, 10)]
    assert "<h2>Loss" in render_stage({"stage": "dense"}, steps)
