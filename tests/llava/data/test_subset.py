"""A drawn subset can be drawn again, contains the smaller ones, and never harms its input."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava import files
from llava.data.records import DataError, RecordFile
from llava.data.subset import OutputFile, SubsetSettings, _bounds, draw_subset, parse_split, write_outputs

SCRIPT = Path(__file__).parents[3] / "random_drop.py"
COUNTS = {"coco": 200, "gqa": 60, "ocr_vqa": 30, "text": 10, "tiny": 1}


def _record(index: int, source: str) -> dict:
    image = {} if source == "text" else {"image": f"{source}/{index}.jpg"}
    tag = "" if source == "text" else "<image>\n"
    talk = [{"from": "human", "value": f"{tag}Wie heißt {index}?"}, {"from": "gpt", "value": "é"}]
    return {"id": f"same{index % 7}", **image, "conversations": talk}  # ids repeat


OBJECTS = [_record(i, source) for i, source in enumerate(s for s, count in COUNTS.items() for _ in range(count))]
OBJECTS = [OBJECTS[i] for i in np.random.default_rng(0).permutation(len(OBJECTS))]


@pytest.fixture
def mixture(tmp_path):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(OBJECTS, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _draw(mixture, name="out.json", overwrite=False, **settings):
    output = mixture.with_name(name)
    result = draw_subset(mixture, output, SubsetSettings(**settings), overwrite=overwrite)
    return result, output


def _names(path) -> list[str]:
    return [RecordFile(path).raw(index)["conversations"][0]["value"] for index in range(len(RecordFile(path)))]


def _run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_half_keeps_half_of_every_source_in_file_order(mixture):
    result, output = _draw(mixture)
    assert result.before == COUNTS
    assert result.parts[0].counts == {"coco": 100, "gqa": 30, "ocr_vqa": 15, "text": 5, "tiny": 1}
    kept = json.loads(output.read_text(encoding="utf-8"))
    assert kept == [obj for obj in OBJECTS if obj in kept]


def test_literal_input_gives_literal_output(tmp_path):
    records = [
        '{"id":  "a", "image": "coco/1.jpg"}',
        '{"id": "b"}',
        '{"id": "b"}',
        '{"id": "c",\n "image": "vg/2.jpg"}',
    ]
    (tmp_path / "in.json").write_text("[" + " , ".join(records) + "]")
    settings = SubsetSettings(keep_ratio=1.0)
    draw_subset(tmp_path / "in.json", tmp_path / "out.json", settings)
    assert (tmp_path / "out.json").read_text() == "[\n" + ",\n".join(records) + "\n]\n"
    draw_subset(tmp_path / "in.json", tmp_path / "out.jsonl", settings)
    assert (tmp_path / "out.jsonl").read_text() == "\n".join(record.replace("\n", "") for record in records) + "\n"
    draw_subset(tmp_path / "out.jsonl", tmp_path / "back.json", settings)
    assert json.loads((tmp_path / "back.json").read_text()) == [json.loads(record) for record in records]


def test_equal_seeds_give_equal_files_and_other_seeds_do_not(mixture):
    _, first = _draw(mixture, "a.json", seed=1)
    _, again = _draw(mixture, "b.json", seed=1)
    _, other = _draw(mixture, "c.json", seed=2)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_draw_stays_the_same_for_ever(tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"id": "x{i}"}}\n' for i in range(10)))
    _, output = _draw(tmp_path / "in.jsonl", "out.jsonl", keep_ratio=0.3, seed=42)
    expected = sorted(range(10), key=lambda i: hashlib.blake2b(f"42\t{i}\tx{i}".encode(), digest_size=8).digest())[:3]
    assert output.read_text() == "".join(f'{{"id": "x{i}"}}\n' for i in sorted(expected))


@pytest.mark.parametrize("stratify", ["source", "modality", "none"])
@pytest.mark.parametrize("max_per_source", [None, 20])
def test_a_smaller_ratio_is_contained_in_a_larger_one(mixture, stratify, max_per_source):
    smaller: set[str] = set()
    for ratio in (0.0, 0.001, 0.1, 0.29, 0.5, 0.9, 1.0):
        settings = {"keep_ratio": ratio, "stratify": stratify, "max_per_source": max_per_source}
        result, output = _draw(mixture, f"{ratio}.json", **settings)
        larger = set(_names(output)) if ratio else set()
        assert smaller <= larger and len(larger) == result.parts[0].num_records
        smaller = larger
    assert len(smaller) == (len(OBJECTS) if max_per_source is None else 20 + 20 + 20 + 10 + 1)


def test_no_source_drops_to_zero_unless_the_ratio_is_zero(mixture):
    assert all(_draw(mixture, "some.json", keep_ratio=0.001)[0].parts[0].counts.values())
    result, output = _draw(mixture, "none.json", keep_ratio=0.0)
    assert json.loads(output.read_text()) == [] and "holds no record" in result.warnings[0]


def test_exclude_and_require_images_leave_records_out(mixture, tmp_path):
    for folder in ("coco", "gqa", "ocr_vqa"):
        (tmp_path / "images" / folder).mkdir(parents=True)
    present = [obj["image"] for obj in OBJECTS if obj.get("image", "").startswith(("coco", "ocr_vqa"))]
    for name in present:
        Image.new("RGB", (2, 2)).save(tmp_path / "images" / name, format="JPEG")
    (tmp_path / "images" / next(name for name in present if name.startswith("coco"))).write_bytes(b"")
    settings = {"exclude_sources": ("ocr_vqa",), "require_images": str(tmp_path / "images")}
    result, _ = _draw(mixture, keep_ratio=1.0, **settings)
    assert result.parts[0].counts == {"coco": 199, "gqa": 0, "ocr_vqa": 0, "text": 10, "tiny": 0}


def test_modulo_reproduces_the_published_rule(mixture):
    for ratio, last in ((0.5, 50), (0.07, 7), (0.29, 29)):
        _, output = _draw(mixture, f"{last}.json", mode="modulo", keep_ratio=ratio)
        assert json.loads(output.read_text()) == [obj for index, obj in enumerate(OBJECTS) if index % 100 < last]


def test_split_parts_are_disjoint_and_of_the_asked_size(mixture):
    parts = parse_split("router=0.067, adapter=0.3,finetune=0.5")
    result, output = _draw(mixture, split=parts)
    assert [part.path.name for part in result.parts] == ["out.router.json", "out.adapter.json", "out.finetune.json"]
    assert not output.exists()
    names = [_names(part.path) for part in result.parts]
    assert len(set().union(*names)) == sum(map(len, names))
    assert [part.counts["coco"] for part in result.parts] == [13, 60, 100]
    assert all(part.counts["text"] for part in result.parts)


def test_whole_split_uses_every_record(mixture):
    result, _ = _draw(mixture, split=(("a", 0.1), ("b", 0.2), ("c", 0.7)))
    assert sum(part.num_records for part in result.parts) == len(OBJECTS)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 1000])
@pytest.mark.parametrize("ratios", [[1.0], [0.001, 0.001], [0.5, 0.001, 0.499], [0.1] * 10])
def test_bounds_rise_within_the_stratum_and_leave_no_part_empty(size, ratios):
    bounds = _bounds(size, ratios)
    assert bounds[0] == 0 and bounds[-1] <= size and bounds == sorted(bounds)
    if size >= len(ratios):
        assert len(set(bounds)) == len(bounds)


def test_manifest_says_how_to_do_it_again(mixture):
    result = draw_subset(mixture, mixture.with_name("out.json"), SubsetSettings(), command="python random_drop.py")
    manifest = json.loads(mixture.with_name("out.json.manifest.json").read_text())
    assert manifest["input_sha256"] == hashlib.sha256(mixture.read_bytes()).hexdigest()
    assert manifest["output_sha256"] == hashlib.sha256(mixture.with_name("out.json").read_bytes()).hexdigest()
    assert (manifest["before"], manifest["after"]) == (COUNTS, result.parts[0].counts)
    assert manifest["command"] == "python random_drop.py"
    assert (manifest["records"], manifest["input_records"]) == (151, 301)
    assert manifest["settings"] == {
        "mode": "random",
        "seed": 42,
        "stratify": "source",
        "keep_ratio": 0.5,
        "exclude_sources": [],
        "require_images": None,
        "max_per_source": None,
        "split": None,
    }
    kept = {index for index, obj in enumerate(OBJECTS) if obj in json.loads(mixture.with_name("out.json").read_text())}
    keys = sorted(f"{index}\t{OBJECTS[index]['id']}" for index in kept)
    assert manifest["kept_keys_sha256"] == hashlib.sha256("\n".join(keys).encode()).hexdigest()


def test_same_command_twice_says_already_there(mixture):
    _, output = _draw(mixture)
    stamp = output.stat().st_mtime_ns
    assert _draw(mixture)[0].parts[0].was_there
    assert output.stat().st_mtime_ns == stamp


def test_other_content_is_kept_unless_overwrite(mixture):
    _, output = _draw(mixture)
    with pytest.raises(DataError, match="not the result of this command"):
        _draw(mixture, seed=43)
    output.write_text("[]")
    with pytest.raises(DataError, match="not the result of this command"):
        _draw(mixture)
    assert output.read_text() == "[]"
    assert not _draw(mixture, overwrite=True)[0].parts[0].was_there


@pytest.mark.parametrize("overwrite", [False, True])
def test_input_is_never_overwritten(mixture, overwrite):
    before = mixture.read_bytes()
    (mixture.parent / "link.json").symlink_to(mixture)
    (mixture.parent / "hard.json").hardlink_to(mixture)
    for name in ("mix.json", "link.json", "hard.json"):
        with pytest.raises(DataError, match="is the input itself"):
            _draw(mixture, name, overwrite=overwrite)
    assert mixture.read_bytes() == before


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_full_disk_leaves_nothing_behind(mixture, monkeypatch, fail_at):
    calls = []

    def fsync(_):
        calls.append(1)
        if len(calls) == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(DataError, match="No space left on device"):
        _draw(mixture, split=(("a", 0.5), ("b", 0.5)))
    assert [path.name for path in mixture.parent.iterdir()] == ["mix.json"]


def test_interrupt_leaves_nothing_behind(mixture):
    def interrupt(index, text):
        raise KeyboardInterrupt

    files = [OutputFile(mixture.with_name("out.json"), np.arange(3), {})]
    with pytest.raises(KeyboardInterrupt):
        write_outputs(files, RecordFile(mixture), rewrite=interrupt)
    assert [path.name for path in mixture.parent.iterdir()] == ["mix.json"]


def test_losing_all_text_only_records_is_said(mixture):
    result, _ = _draw(mixture, exclude_sources=("text",))
    assert any("no text-only record" in warning for warning in result.warnings)
    assert not any("no text-only" in warning for warning in _draw(mixture, "b.json")[0].warnings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 1.5}, "Keep ratio 1.5 is out of range"),
        ({"keep_ratio": float("nan")}, "Keep ratio nan is out of range"),
        ({"mode": "odd"}, "Mode 'odd' is unknown"),
        ({"stratify": "length"}, "Stratum 'length' is unknown"),
        ({"max_per_source": 0}, "Maximum per source 0 is too small"),
        ({"require_images": "/no/such/folder"}, "is not a folder; the image folder"),
        ({"split": (("a", 0.6), ("b", 0.5))}, "The parts sum to 1.1"),
        ({"split": (("a", 0.1), ("a", 0.1))}, "'a' is named twice"),
        ({"split": (("../a", 0.1),)}, "cannot become part of a file name"),
        ({"split": (("a", 0.0),)}, "Part 'a' has ratio 0.0"),
        ({"split": (("a", 0.1),), "mode": "modulo"}, "in mode modulo"),
        ({"exclude_sources": ("cocoo",)}, "Source 'cocoo' is not in .* coco, gqa, ocr_vqa, text, tiny are there"),
        ({"exclude_sources": tuple(COUNTS)}, "No record of .* is left"),
    ],
)
def test_bad_settings_are_refused(mixture, settings, message):
    with pytest.raises(DataError, match=message):
        _draw(mixture, **settings)
    assert [path.name for path in mixture.parent.iterdir()] == ["mix.json"]


def test_script_without_arguments_halves_the_mixture(tmp_path):
    missing = _run(tmp_path)
    assert missing.returncode == 2 and "llava_v1_5_mix665k.json does not exist" in missing.stderr
    folder = tmp_path / "playground" / "data"
    folder.mkdir(parents=True)
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(OBJECTS))
    done = _run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads((folder / "llava_v1_5_mix665k_50.json").read_text())) == 151
    assert "already there" in _run(tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "mix.json"], "--output is missing"),
        (["--input", "absent.json", "--output", "x.json"], "absent.json does not exist"),
        (["--input", "mix.json", "--output", "no/x.json"], "output folder no does not exist"),
        (["--input", "mix.json", "--output", "."], "is a folder"),
        (["--input", "mix.json", "--output", "x.json", "--split", "a"], "'a' is not NAME=RATIO"),
        (["--input", "mix.json", "--output", "x.json", "--split", "a=1", "--keep-ratio", "1"], "were both given"),
        (["--input", "mix.json", "--output", "x.json", "--mode", "modulo", "--seed", "1"], "--seed has no effect"),
        (["--input", "mix.json", "--output", "x.json", "--keep", "1"], "unrecognized arguments"),
    ],
)
def test_script_refuses_with_exit_code_2_and_writes_nothing(mixture, arguments, message):
    done = _run(mixture.parent, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in mixture.parent.iterdir()] == ["mix.json"]


def test_script_names_a_broken_record(tmp_path):
    (tmp_path / "mix.json").write_text('[{"id": "a"}, {"id": "b", "image": 3}]')
    done = _run(tmp_path, "--input", "mix.json", "--output", "out.json")
    assert done.returncode == 2 and "mix.json: record 1 (id 'b'): 'image' holds a number" in done.stderr
