"""The lmms-eval task on the digits dataset."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from playground.digits.questions import IMAGE_QUESTIONS, TEXT_QUESTIONS
from playground.digits.task import TASK_FOLDER, main, write_task

RECORD = {
    "id": "test-000001",
    "image": "pair/test-000001.png",
    "conversations": [
        {"from": "human", "value": "<image>\nRead the top row."},
        {"from": "gpt", "value": "seven, empty"},
    ],
    "type": "row",
    "complexity": 2,
}
SPOKEN = {"id": "test-text-0", "conversations": RECORD["conversations"], "type": "spoken_sum", "image": None}


@pytest.fixture(scope="module")
def utils():
    """The task's functions, loaded from their path as lmms-eval does."""
    spec = importlib.util.spec_from_file_location("digits_task_utils", TASK_FOLDER / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_yaml(path: Path) -> dict:
    """The task, with its functions as their names."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load(path.read_text(), loader)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with one image and an empty test split."""
    folder = tmp_path / "data"
    (folder / "images" / "pair").mkdir(parents=True)
    Image.new("L", (32, 32), 9).save(folder / "images" / RECORD["image"])
    (folder / "digits_test.json").write_text("[]")
    return folder


def test_every_question_type_has_a_metric(utils) -> None:
    metrics = {metric["metric"] for metric in read_yaml(TASK_FOLDER / "digits.yaml")["metric_list"]}
    types = {question.name for question in (*IMAGE_QUESTIONS, *TEXT_QUESTIONS)}
    assert metrics == {"exact_match", "exact_match_text_only"} | {f"exact_match_{name}" for name in types}


def test_the_question_comes_without_the_image_marker(utils) -> None:
    assert utils.doc_to_text(RECORD, {}) == "Read the top row."
    assert utils.doc_to_target(RECORD) == "seven, empty"


@pytest.mark.parametrize(
    ("answer", "score"), [("seven, empty", 1.0), (" Seven,  empty. ", 1.0), ("seven", 0.0), ("", 0.0)]
)
def test_answers_are_compared_without_case_blanks_and_full_stop(utils, answer: str, score: float) -> None:
    assert utils.process_results(RECORD, [answer]) == {"exact_match": score, "exact_match_row": score}


def test_questions_without_image_are_scored_apart(utils) -> None:
    assert utils.process_results(SPOKEN, ["seven, empty"]) == {
        "exact_match_text_only": 1.0,
        "exact_match_spoken_sum": 1.0,
    }
    assert utils.doc_to_visual(SPOKEN, {"data_folder": "nowhere"}) == []


def test_images_come_from_the_data_folder_or_the_environment(
    utils, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = utils.doc_to_visual(RECORD, {"data_folder": str(data)})
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (32, 32), (9, 9, 9))
    monkeypatch.setenv("DIGITS_DATA", str(data))
    assert len(utils.doc_to_visual(RECORD, {"data_folder": "nowhere"})) == 1


def test_a_copy_of_the_task_differs_in_its_paths_only(data: Path, tmp_path: Path) -> None:
    main(["--data", str(data), "--output", str(tmp_path / "task")])
    original, copy = read_yaml(TASK_FOLDER / "digits.yaml"), read_yaml(tmp_path / "task" / "digits.yaml")
    assert copy["dataset_kwargs"]["data_files"]["test"] == str(data / "digits_test.json")
    assert copy["lmms_eval_specific_kwargs"]["default"]["data_folder"] == str(data)
    assert json.dumps(copy).replace(str(data), "playground/data/digits") == json.dumps(original)
    assert (tmp_path / "task" / "utils.py").read_text() == (TASK_FOLDER / "utils.py").read_text()


def test_a_folder_without_the_test_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no digits_test.json"):
        write_task(tmp_path, tmp_path / "task")
