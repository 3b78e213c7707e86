"""Promises of the digits dataset; the answers are recomputed here without the generator's code."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from playground.digits import generate as generate_module
from playground.digits.generate import Settings, generate, main
from playground.digits.questions import IMAGE_QUESTIONS, TEXT_QUESTIONS
from playground.digits.scans import Jitter, draw_scan, load_scans, split_scans

SETTINGS = Settings(seed=3, train=900, validation=120, test=264)
SPLITS = ("train", "validation", "test")
NUMBERS = dict(enumerate("zero one two three four five six seven eight nine ten".split()))
NUMBERS |= dict(enumerate("eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split(), start=11))
VALUES = {name: number for number, name in NUMBERS.items()}
CELLS = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "data"
    assert generate(folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def records(dataset) -> dict[str, list[dict]]:
    return {split: json.loads((dataset / f"digits_{split}.json").read_text()) for split in SPLITS}


def turns_of(record: dict) -> list[tuple[str, str, str]]:
    """Type, question and answer of each turn."""
    values = [message["value"].removeprefix("<image>\n") for message in record["conversations"]]
    return list(zip(record["type"].split("+"), values[::2], values[1::2], strict=True))


def cells_in(question: str) -> list[int]:
    return [CELLS[name] for name in re.findall("(?:top|bottom) (?:left|right)", question)]


def digits_in(text: str) -> list[int]:
    return [VALUES[word] for word in re.findall(r"\w+", text) if word in VALUES]


def recompute(kind: str, question: str, digits: list[int | None]) -> str:
    """Answer a question from the words of the question and the digits of the canvas."""
    shown = [digit for digit in digits if digit is not None]
    named = [digits[cell] for cell in cells_in(question)]
    spoken = digits_in(question)
    word = {True: "yes", False: "no"}
    if kind == "position":
        return "empty" if named[0] is None else NUMBERS[named[0]]
    if kind == "empty":
        return word[named[0] is None]
    if kind == "presence_at":
        return word[named == spoken]
    if kind == "parity":
        return ("even", "odd")[named[0] % 2]
    if kind == "presence":
        return word[spoken[0] in shown]
    if kind == "count":
        return NUMBERS[len(shown)]
    if kind == "row":
        row = digits[:2] if "top" in question else digits[2:]
        return ", ".join("empty" if digit is None else NUMBERS[digit] for digit in row)
    if kind in ("compare", "spoken_larger"):
        first, second = named or spoken
        assert first != second, "two equal digits have no larger one"
        return NUMBERS[max(first, second)]
    if kind in ("sum_two", "spoken_sum"):
        first, second = named or spoken
        return NUMBERS[first + second]
    if kind in ("largest", "smallest"):
        assert len(shown) >= 2
        return NUMBERS[sorted(shown)[-1 if kind == "largest" else 0]]
    if kind == "spoken_order":
        return NUMBERS[spoken[0] + (1 if "after" in question else -1)]
    raise AssertionError(f"no recomputation for {kind}")


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(records, split):
    for record in records[split]:
        for kind, question, answer in turns_of(record):
            if kind == "read_all":
                cells = re.findall(r"in the (\w+ \w+) cell there is (?:nothing|an? (\w+))", answer.lower())
                assert [name for name, _ in cells] == list(CELLS)
                assert [VALUES[name] if name else None for _, name in cells] == record["digits"]
            else:
                assert answer == recompute(kind, question, record.get("digits", [])), record


def test_digits_in_records_are_the_labels_of_their_scans(records):
    _, labels = load_scans()
    for record in records["train"] + records["validation"] + records["test"]:
        if "image" in record:
            shown = [None if scan is None else labels[scan] for scan in record["scans"]]
            assert shown == record["digits"]


def test_splits_share_no_scan(records):
    scans, _ = load_scans()
    used = {
        split: {scan for record in records[split] for scan in record.get("scans", []) if scan is not None}
        for split in SPLITS
    }
    pixels = {split: {scans[scan].tobytes() for scan in used[split]} for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not used[one] & used[other]
        assert not pixels[one] & pixels[other]


def test_scan_split_is_stratified_and_complete():
    split = split_scans(seed=0)
    sizes = {name: [len(scans) for scans in by_digit.values()] for name, by_digit in split.items()}
    assert sizes["train"] == [120] * 10
    assert sizes["test"] == [40] * 10
    assert sum(sizes["validation"]) == 197
    everything = [scan for by_digit in split.values() for scans in by_digit.values() for scan in scans]
    assert sorted(everything) == list(range(1797))


def test_records_follow_the_llava_format(dataset, records):
    for split in SPLITS:
        assert len({record["id"] for record in records[split]}) == len(records[split])
        for record in records[split]:
            senders = [message["from"] for message in record["conversations"]]
            assert senders == ["human", "gpt"] * (len(senders) // 2) and senders
            text = "".join(message["value"] for message in record["conversations"])
            if "image" in record:
                assert record["conversations"][0]["value"].startswith("<image>\n")
                assert text.count("<image>") == 1
                folder = ("single", "pair", "triple", "quad")[sum(d is not None for d in record["digits"]) - 1]
                assert record["image"] == f"{folder}/{record['id']}.png"
                assert (dataset / "images" / record["image"]).is_file()
            else:
                assert "<image>" not in text


def test_images_are_small_rgb_png_without_jitter_outside_training(dataset, records):
    for record in records["test"][:40]:
        if "image" not in record:
            continue
        with Image.open(dataset / "images" / record["image"]) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
            pixels = np.asarray(image)
        for cell, scan in enumerate(record["scans"]):
            row, column = divmod(cell, 2)
            found = pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            expected = np.zeros((16, 16)) if scan is None else np.asarray(draw_scan(scan, Jitter()))
            assert (found == expected[..., None]).all()


def test_jitter_keeps_the_scan_recognisable_and_moves_it():
    random = Random(0)
    for scan in range(20):
        plain = np.asarray(draw_scan(scan, Jitter()), dtype=float)
        jittered = np.asarray(draw_scan(scan, Jitter.draw(random)), dtype=float)
        assert (plain != jittered).any()
        assert np.corrcoef(plain.ravel(), jittered.ravel())[0, 1] > 0.6


def test_scans_of_the_test_split_are_recognisable_from_those_of_the_training_split():
    from sklearn.svm import SVC

    cells, labels = {}, {}
    for name, by_digit in split_scans(seed=0).items():
        labels[name] = [digit for digit, scans in by_digit.items() for _ in scans]
        scans = [scan for scans in by_digit.values() for scan in scans]
        cells[name] = np.stack([np.asarray(draw_scan(scan, Jitter())).ravel() / 255 for scan in scans])
    classifier = SVC(C=10, gamma=0.02).fit(cells["train"], labels["train"])
    assert classifier.score(cells["test"], labels["test"]) > 0.98


def test_upscaling_keeps_the_mean_of_the_scan():
    for scan in range(20):
        assert np.asarray(draw_scan(scan, Jitter())).mean() == pytest.approx(load_scans()[0][scan].mean(), rel=0.1)


def test_jitter_shifts_right_and_down_and_turns_clockwise_for_positive_values():
    plain = np.asarray(draw_scan(0, Jitter()))
    shifted = np.asarray(draw_scan(0, Jitter(shift_x=1, shift_y=2)))
    assert (shifted[2:, 1:] == plain[:-2, :-1]).all()
    # Scan 1 is an upright stroke: turned clockwise, its upper part lies to the right of its lower part.
    columns = np.arange(16)
    turned = np.asarray(draw_scan(1, Jitter(degrees=30)), dtype=float)
    upright = np.asarray(draw_scan(1, Jitter()), dtype=float)
    lean = [
        (half[:8] @ columns).sum() / half[:8].sum() - (half[8:] @ columns).sum() / half[8:].sum()
        for half in (turned, upright)
    ]
    assert lean[0] > lean[1] + 1


def test_test_split_holds_every_type_equally_often_in_single_turns(records):
    counts = Counter(record["type"] for record in records["test"] if "image" in record)
    assert counts == {question_type.name: 22 for question_type in IMAGE_QUESTIONS}
    text = Counter(record["type"] for record in records["test"] if "image" not in record)
    assert text.keys() == {question_type.name for question_type in TEXT_QUESTIONS}
    assert all(len(record["conversations"]) == 2 for record in records["test"] + records["validation"])


def test_validation_split_holds_every_type_equally_often(records):
    counts = Counter(record["type"] for record in records["validation"] if "image" in record)
    assert counts == {question_type.name: 10 for question_type in IMAGE_QUESTIONS}


@pytest.mark.parametrize("question_type", [each for each in IMAGE_QUESTIONS if each.balanced_answers])
def test_promised_answers_are_balanced_in_the_test_split(records, question_type):
    answers = Counter(turns_of(record)[0][2] for record in records["test"] if record["type"] == question_type.name)
    assert set(answers) == set(question_type.balanced_answers)
    assert max(answers.values()) - min(answers.values()) <= 1


def test_training_yes_and_no_are_balanced(records):
    answers = defaultdict(Counter)
    for record in records["train"]:
        for kind, _, answer in turns_of(record):
            if answer in ("yes", "no"):
                answers[kind][answer] += 1
    assert answers.keys() == {"empty", "presence", "presence_at"}
    for count in answers.values():
        assert 0.35 < count["yes"] / count.total() < 0.65


def test_training_mixes_one_to_four_turns_of_different_types(records):
    lengths = Counter()
    for record in records["train"]:
        kinds = record["type"].split("+")
        assert len(set(kinds)) == len(kinds)
        lengths[len(kinds)] += "image" in record
    assert lengths.keys() == {1, 2, 3, 4}
    assert sum("image" not in record for record in records["train"]) == 100
    assert {kind for record in records["train"] for kind in record["type"].split("+")} == {
        question_type.name for question_type in IMAGE_QUESTIONS + TEXT_QUESTIONS
    }


def test_complexity_of_a_record_is_that_of_its_most_complex_turn(records):
    complexity = {question_type.name: question_type.complexity for question_type in IMAGE_QUESTIONS + TEXT_QUESTIONS}
    for record in records["train"]:
        assert record["complexity"] == max(complexity[kind] for kind in record["type"].split("+"))
    assert set(complexity.values()) == {1, 2, 3}


@pytest.mark.parametrize("question_type", IMAGE_QUESTIONS, ids=lambda each: each.name)
def test_types_that_need_all_cells_name_no_cell_and_the_others_do(records, question_type):
    for record in records["test"]:
        kind, question, _ = turns_of(record)[0]
        if kind == question_type.name:
            assert bool(re.search("top|bottom", question)) != question_type.needs_all_cells


def test_same_settings_give_the_same_dataset_whatever_the_workers(dataset, tmp_path):
    generate(tmp_path / "again", SETTINGS, workers=2)
    files = {path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert all((dataset / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in files)


def test_another_seed_gives_another_dataset_and_other_held_out_scans(dataset, tmp_path):
    generate(tmp_path / "other", Settings(seed=4, train=20, validation=12, test=12))
    ours = json.loads((dataset / "manifest.json").read_text())
    other = json.loads((tmp_path / "other" / "manifest.json").read_text())
    assert ours["scan_split_sha256"] != other["scan_split_sha256"]
    assert ours["splits"]["test"]["pixels_sha256"] != other["splits"]["test"]["pixels_sha256"]


@pytest.mark.parametrize("split", SPLITS)
def test_manifest_hashes_are_those_of_the_files(dataset, records, split):
    summary = json.loads((dataset / "manifest.json").read_text())["splits"][split]
    assert summary["json_sha256"] == hashlib.sha256((dataset / f"digits_{split}.json").read_bytes()).hexdigest()
    pixels = hashlib.sha256()
    for path in sorted((dataset / "images").glob(f"*/{split}-*.png"), key=lambda path: path.name):
        with Image.open(path) as image:
            pixels.update(np.asarray(image).tobytes())
    assert summary["pixels_sha256"] == pixels.hexdigest()
    assert summary["records"] == len(records[split])
    assert summary["images"] == sum("image" in record for record in records[split])


def test_same_settings_are_reused_and_others_refused(dataset, capsys):
    arguments = ["--output", str(dataset), "--seed", "3", "--train", "900", "--validation", "120"]
    main([*arguments, "--test", "264"])
    assert "exists with the same settings, reused" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="give another --output"):
        generate(dataset, Settings(seed=5))
    with pytest.raises(SystemExit):
        main([*arguments, "--test", "12"])
    assert "only the same dataset can be reused" in capsys.readouterr().err


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        generate(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["json", "image"])
def test_damaged_dataset_is_not_reused(tmp_path, damage):
    settings = Settings(train=2, validation=2, test=12)
    folder = tmp_path / "data"
    folder.mkdir()  # An empty folder is as good as none.
    assert generate(folder, settings)
    if damage == "json":
        (folder / "digits_train.json").write_text("[]")
    else:
        next(folder.glob("images/*/train-*.png")).unlink()
    with pytest.raises(FileExistsError, match="generate it again"):
        generate(folder, settings)


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "render_canvas", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "data", Settings(train=2, validation=2, test=12))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("numbers", "match"), [({"test": 100}, "multiple of 12"), ({"train": 0}, "at least 1")])
def test_impossible_settings_are_refused(numbers, match):
    with pytest.raises(ValueError, match=match):
        Settings(**numbers)
