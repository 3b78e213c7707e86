"""Promises of the command ``fuzzyroe``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fuzzyroe.rules.yaml_io import load_rule_base, save_rule_base
from llava.cli.app import app
from llava.cli.terminal import describe_error, is_user_error

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str | Path):
    """Run a command; stdout and stderr are kept apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def record(identifier: str, question: str, answer: str, image: str | None = None) -> dict:
    """A record of one turn."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identifier, **({"image": image} if image else {}), "conversations": turns}


@pytest.fixture
def data(tmp_path):
    """Two good records, one with an image that is not there."""
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "coco" / "good.png")
    records = [
        record("a", "<image>\nWhat is this?", "a black square", "coco/good.png"),
        record("b", "Which digit comes after one?", "two"),
        record("c", "<image>\nAnd this?", "lost", "coco/lost.png"),
    ]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(records))
    return path


def cells(output: str, first: str) -> list[str]:
    """The cells of the line that starts with a word."""
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [first])


def test_help_names_every_command_and_loads_nothing_heavy():
    program = (
        "import sys\nsys.argv = ['fuzzyroe', '--help']\nfrom llava.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'skfuzzy', 'scipy', 'numpy', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("check-data", "data-stats", "rules", "explain", "report"):
        assert name in result.stdout


def test_check_data_fails_on_a_missing_image(data):
    result = run("check-data", data, "--image-folder", data.parent)
    assert result.exit_code == 2
    assert cells(result.stdout, "coco") == ["coco", "2", "1", "0", "2", "1", "0", "0", "0"]
    assert "record 2 (id 'c'): Image 'coco/lost.png' is not in" in result.stderr
    assert "1 of 3 records cannot be trained on" in result.stderr


def test_check_data_writes_a_file_without_bad_records(data):
    output = data.with_name("good.json")
    result = run("check-data", data, "--image-folder", data.parent, "--on-missing", "drop", "--output", output)
    assert result.exit_code == 0, result.stderr
    assert [entry["id"] for entry in json.loads(output.read_text())] == ["a", "b"]
    assert run("check-data", output, "--image-folder", data.parent, "--decode", "--version", "v1").exit_code == 0


def test_check_data_with_a_model_needs_its_template(data):
    result = run("check-data", data, "--image-folder", data.parent, "--model", "anything")
    assert result.exit_code == 2 and "--version" in result.stderr


def test_check_data_shows_trained_and_masked_text(data, tmp_path, tiny_llava, tokenizer):
    tiny_llava.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    output = data.with_name("good.json")
    run("check-data", data, "--image-folder", data.parent, "--on-missing", "drop", "--output", output)
    result = run(
        *("check-data", output, "--image-folder", data.parent, "--model", tmp_path / "model"),
        *("--version", "digits", "--model-max-length", "60", "--show", "1"),
    )
    assert result.exit_code == 0, result.stderr
    lines = [line.strip() for line in result.stdout.splitlines()]
    kinds = [line.split()[2:4] for line in lines if line.startswith("turn ")]
    assert kinds == [["masked", "2"], ["image", "16"], ["masked", "4"], ["trained", "4"]]
    assert "a black square" in lines[-1]
    assert any("0 of 2 records (0.0%) exceed 60 and are cut" in line for line in lines)
    assert any(line.startswith("tokens of 2 sampled records") for line in lines)


def test_data_stats_counts_per_source(data):
    result = run("data-stats", data)
    assert result.exit_code == 0
    assert cells(result.stdout, "coco")[:5] == ["coco", "2", "2", "0", "2"]
    assert cells(result.stdout, "text")[:5] == ["text", "1", "0", "1", "0"]
    assert cells(result.stdout, "total")[5:] == "1 / 1 / 1 3 / 3 / 5 1 / 1 / 3".split()


def test_rules_show_tells_origins_apart():
    result = run("rules", "show", "default")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["low", "low", "low", "0.000", "–", "–"] in lines and ["low", "low", "medium", "–", "0.111", "–"] in lines
    assert "12 of 27 combinations have no rule in the file" in result.stdout


def test_rules_check_accepts_the_default():
    result = run("rules", "check", "default")
    assert result.exit_code == 0
    assert "the expert gives 15 of 27 rules (56%)" in result.stdout
    assert "to be interpolated: low, low, medium" in result.stdout


def test_rules_check_refuses_contradictions_and_conflicts(tmp_path):
    text = (ROOT / "fuzzyroe" / "rules" / "bases" / "default.yaml").read_text()
    contradiction = tmp_path / "contradiction.yaml"
    contradiction.write_text(text.replace("[high, high, high, 1.0]", "[high, high, high, 0.1]"))
    assert contradiction.read_text() != text
    result = run("rules", "check", contradiction)
    assert result.exit_code == 2 and "more than (high, high, high) and should not" in result.stdout
    conflict = tmp_path / "conflict.yaml"
    conflict.write_text(text.replace("[high, high, high, 1.0]", "[low, low, low, 1.0]"))
    result = run("rules", "check", conflict)
    assert result.exit_code == 2 and "conflicts with the rule of line" in result.stderr


def test_rules_complete_writes_every_rule_and_replaces_nothing_unasked(tmp_path):
    output = tmp_path / "complete.yaml"
    assert run("rules", "complete", "default", "--output", output).exit_code == 0
    assert load_rule_base(output) == load_rule_base("default").interpolate()
    result = run("rules", "complete", "default", "--output", output)
    assert result.exit_code == 2 and "exists; commands replace nothing unasked" in result.stderr
    assert run("rules", "complete", "default", "--output", output, "--method", "additive", "--overwrite").exit_code == 0
    assert load_rule_base(output).interpolation.method == "additive"


@pytest.mark.parametrize(("dialect", "head"), [("fcl", "FUNCTION_BLOCK default"), ("fis", "[System]")])
def test_rules_export_writes_to_stdout_or_a_file(tmp_path, dialect, head):
    result = run("rules", "export", "default", "--format", dialect)
    assert result.exit_code == 0 and result.stdout.startswith(head)
    output = tmp_path / "rules.txt"
    assert run("rules", "export", "default", "--format", dialect, "--output", output).exit_code == 0
    assert output.read_text() == result.stdout


def test_rules_export_gives_a_fitted_rule_base_a_name(tmp_path):
    fitted = load_rule_base("default").interpolate().fit(np.full((9, 3), 0.5), np.ones(9))
    save_rule_base(fitted, tmp_path / "rule_base.yaml")
    output = tmp_path / "mine.yaml"
    assert run("rules", "export", tmp_path, "--format", "yaml", "--name", "mine", "--output", output).exit_code == 0
    assert load_rule_base(str(output)) == replace(fitted, name="mine")


def test_rules_plot_draws_terms_and_surface(tmp_path):
    assert run("rules", "plot", "default", "--output", tmp_path).exit_code == 0
    for name in ("memberships.png", "control_surface.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.width > 500


def test_rules_plot_draws_what_fired_in_a_fit_and_show_counts_it(tmp_path):
    features = np.random.default_rng(0).random((40, 3))
    fitted = load_rule_base("default").interpolate().fit(features, features.mean(axis=1))
    save_rule_base(fitted, tmp_path / "rule_base.yaml")
    assert run("rules", "plot", tmp_path, "--output", tmp_path).exit_code == 0
    with Image.open(tmp_path / "firing.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert f"{fitted.report(features)[0].effective_examples:.1f}" in run("rules", "show", tmp_path).stdout
    assert "  low, low, low: informed by" in run("rules", "check", tmp_path).stdout


def test_rules_diff_accepts_a_checkpoint_folder(tmp_path):
    run("rules", "complete", "default", "--output", tmp_path / "rule_base.yaml")
    assert run("rules", "diff", "default", "default").stdout.strip() == "no difference"
    result = run("rules", "diff", "default", tmp_path)
    assert result.exit_code == 0 and "12 of 27 rules differ" in result.stdout
    assert "none -> interpolated" in result.stdout


def test_report_prints_tables_and_writes_the_page(tmp_path):
    def write(name: str, correct: list[int], target: float | None) -> Path:
        accuracy = {"all": 1.0, "image": sum(correct) / len(correct), "types": {}}
        answers = {str(number): value for number, value in enumerate(correct)}
        content = {"label": name, "target_skip_ratio": target, "accuracy": accuracy, "correct": answers}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return path

    stage = tmp_path / "router"
    stage.mkdir()
    (stage / "stage.json").write_text(json.dumps({"stage": "router", "samples": 5, "seconds": 61}))
    files = write("dense", [1, 1, 0, 1], None), write("routed", [1, 1, 0, 0], 0.3)
    result = run("report", *files, "--stages", stage, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert cells(result.stdout, "routed")[:3] == ["routed", "30.0", "%"]
    assert cells(result.stdout, "router") == ["router", "1", "min", "01", "s", "–", "5", "–", "–", "–"]
    assert (tmp_path / "out" / "report.html").is_file()
    result = run("report", files[1], "--output", tmp_path / "out")
    assert result.exit_code == 2 and "None of the 1 runs is dense" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rules", "show", "nothing"), "fuzzyroe: No rule base 'nothing' is shipped; known:"),
        (("rules", "show", "absent.yaml"), "fuzzyroe: cannot open absent.yaml (No such file or directory)"),
        (("rules", "complete", "default", "--output", "x.yaml", "--method", "magic"), "Unknown interpolation method"),
        (("data-stats", "absent.json"), "fuzzyroe: absent.json does not exist"),
        (("report", "absent.json", "--output", "out"), "fuzzyroe: cannot open absent.json"),
        (("explain", "--model", "./absent", "--question", "?"), "absent"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bugs_keep_their_traceback():
    def fail_inside_a_library() -> None:
        json.loads("{")

    try:
        fail_inside_a_library()
    except ValueError as error:
        assert not is_user_error(error)
    try:
        load_rule_base("nothing")
    except KeyError as error:
        assert is_user_error(error) and describe_error(error).startswith("No rule base 'nothing'")


def test_estimate_says_what_fits_and_what_would():
    fits = run("estimate", "--stage", "router", "--gpus", "8")
    assert fits.exit_code == 0 and fits.stdout.rstrip().endswith("fits")
    result = run("estimate", "--stage", "finetune", "--gpus", "2", "--gpu-mem", "40")
    assert result.exit_code == 1
    assert "does not fit" in result.stdout and "would fit: --batch" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--model", "70b"), "Size '70b' is unknown"), (("--gpu-mem", "0"), "must be above 0"), (("--stage", "x"), "x")],
)
def test_estimate_refuses_what_it_cannot_compute(arguments, message):
    result = run("estimate", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_doctor_finds_nothing_to_mend_where_the_tests_run():
    result = run("doctor")
    assert result.exit_code == 0
    assert "transformers" in result.stdout and "FAIL" not in result.stdout
