"""The check finds what would stop training hours later, and can write a file without it."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from image_files import make_images
from llava.conversation import get_template
from llava.data.check import DataError, check_data
from llava.data.dataset import SFTDataset
from llava.data.images import ImageState
from llava.data.preprocess import LengthMeter
from llava.data.records import RecordFile, parse_record


def _record(identifier: str, image: str | list | None, answer: str = "Yes.") -> dict:
    tags = "<image>\n" * (len(image) if isinstance(image, list) else int(image is not None))
    talk = [{"from": "human", "value": f"{tags}Is it?"}, {"from": "gpt", "value": answer}]
    return {"id": identifier, **({} if image is None else {"image": image}), "conversations": talk}


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


RECORDS = [
    _record("good", "coco/good.jpg"),
    _record("text", None),
    _record("lost", "coco/lost.jpg"),
    _record("gif", "ocr_vqa/gif.jpg"),
    _record("png", "ocr_vqa/png.jpg"),
    _record("mislabelled", "ocr_vqa/mislabelled.jpg"),
    _record("empty", "vg/empty.jpg"),
    _record("page", "vg/page.jpg"),
    _record("cut", "vg/cut.jpg"),
    _record("no answer", "coco/good.jpg", answer=""),
    _record("two", ["coco/good.jpg", "ocr_vqa/gif.jpg"]),
    {"id": "broken", "image": 3},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(RECORDS, indent=1))
    return path


def _ids(path) -> list[str]:
    return [RecordFile(path).raw(index)["id"] for index in range(len(RecordFile(path)))]


def _row(report, source: str) -> dict:
    return {name: value for name, value in vars(report.sources[source]).items() if value}


def test_clean_data_passes_and_leaves_no_file(tmp_path, images):
    path = tmp_path / "clean.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in RECORDS[:2]))
    report = check_data(path, images, conv_template="v1", decode=True)
    report.raise_if_bad()
    assert (report.is_ok, report.num_records, report.errors, report.usable_path) == (True, 2, [], path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean.jsonl", "images"]


def test_every_finding_is_counted_under_its_source(data, images):
    report = check_data(data, images)
    assert _row(report, "coco") == {"records": 4, "bad": 3, "invalid": 1, "images": 4, "missing": 2}
    assert _row(report, "ocr_vqa") == {"records": 3, "bad": 2, "images": 3, "missing": 2}
    assert _row(report, "vg") == {"records": 3, "bad": 3, "images": 3, "empty": 1, "corrupt": 2}
    assert _row(report, "text") == {"records": 1}
    assert _row(report, "unreadable") == {"records": 1, "bad": 1, "invalid": 1}
    assert (report.num_records, report.num_bad, report.is_ok) == (12, 9, False)


@pytest.mark.parametrize("decode", [False, True])
def test_corrupt_images_are_told_from_mislabelled_ones(data, images, decode):
    report = check_data(data, images, decode=decode)
    assert report.bad_images["vg/page.jpg"] is report.bad_images["vg/cut.jpg"] is ImageState.CORRUPT
    assert "ocr_vqa/mislabelled.jpg" not in report.bad_images


def test_foreign_media_tags_in_records_without_an_image_are_counted(tmp_path, images):
    records = [_record(str(number), None) for number in range(3)]
    records[1]["conversations"][0]["value"] = "<video>\nWhat does she do?"
    report = check_data(_file_of(tmp_path, *records), images)
    assert report.is_ok and report.warnings[0].startswith("1 records without an image hold <video>, <audio>, <img>")


def test_bad_images_are_listed_once_each(data, images):
    report = check_data(data, images)
    assert report.missing_list == data.with_name("missing_images.txt")
    assert report.missing_list.read_text() == (
        "coco/lost.jpg\tmissing\nocr_vqa/gif.jpg\tmissing\nocr_vqa/png.jpg\tmissing\nvg/empty.jpg\tempty\n"
        "vg/page.jpg\tcorrupt\nvg/cut.jpg\tcorrupt\n"
    )


def test_list_of_an_earlier_check_is_emptied_when_all_is_well(tmp_path, images):
    path = tmp_path / "clean.json"
    path.write_text(json.dumps(RECORDS[:2]))
    (tmp_path / "missing_images.txt").write_text("old\tmissing\n")
    assert check_data(path, images).missing_list is None
    assert (tmp_path / "missing_images.txt").read_text() == ""


def test_a_list_that_the_user_wrote_is_kept(data, images):
    path = data.with_name("missing_images.txt")
    path.write_text("ocr_vqa/1.jpg  # asked the publisher\n")
    report = check_data(data, images)
    assert report.missing_list is None and "is no list of this check and is kept" in report.warnings[0]
    assert path.read_text() == "ocr_vqa/1.jpg  # asked the publisher\n"


def test_error_names_records_and_counts_the_rest(data, images):
    report = check_data(data, images, max_shown=2)
    with pytest.raises(DataError, match="9 of 12 records cannot be trained on") as caught:
        report.raise_if_bad()
    assert "record 2 (id 'lost'): Image 'coco/lost.jpg' is not in" in str(caught.value)
    assert "record 3 (id 'gif')" in str(caught.value)
    assert "... and 7 more" in str(caught.value)


def test_drop_writes_the_good_records_only(data, images):
    before = data.read_bytes()
    report = check_data(data, images, decode=True, on_missing="drop")
    assert report.is_ok and report.usable_path == report.output == data.with_name("mix.drop.json")
    assert _ids(report.output) == ["good", "text", "mislabelled"] and report.num_output == 3
    assert check_data(report.output, images, decode=True).is_ok
    assert data.read_bytes() == before
    manifest = json.loads(data.with_name("mix.drop.json.manifest.json").read_text())
    assert manifest["before"] == {"coco": 4, "ocr_vqa": 3, "text": 1, "unreadable": 1, "vg": 3}
    assert manifest["after"] == {"coco": 1, "ocr_vqa": 1, "text": 1, "unreadable": 0, "vg": 0}


def test_resolve_renames_images_and_keeps_every_record(data, images):
    before = data.read_bytes()
    report = check_data(data, images, on_missing="resolve", output=data.with_name("new.json"))
    assert _ids(report.output) == _ids(data) and data.read_bytes() == before
    new = [record.get("image") for record in json.loads(report.output.read_text())]
    assert new[3:5] == ["ocr_vqa/gif.gif", "ocr_vqa/png.PNG"]
    assert new[10] == ["coco/good.jpg", "ocr_vqa/gif.gif"]
    assert _row(report, "ocr_vqa") == {"records": 3, "images": 3, "resolved": 2}
    assert not report.is_ok and "coco/lost.jpg" in report.bad_images and "ocr_vqa/gif.jpg" not in report.bad_images


def test_resolve_is_enough_where_only_endings_were_wrong(tmp_path, images):
    path = tmp_path / "ocr.json"
    path.write_text(json.dumps(RECORDS[3:6]))
    report = check_data(path, images, on_missing="resolve")
    report.raise_if_bad()
    assert check_data(report.usable_path, images, decode=True).is_ok


def test_nothing_left_after_drop_is_refused(tmp_path, images):
    path = tmp_path / "lost.json"
    path.write_text(json.dumps(RECORDS[2:3]))
    with pytest.raises(DataError, match="no record is left after dropping 1"):
        check_data(path, images, on_missing="drop")
    assert not (tmp_path / "lost.drop.json").exists()


@pytest.fixture
def meter(bpe_tokenizer):
    """Measures for 16 positions per image and a maximum of 60 tokens, under the template of the digits."""
    return LengthMeter(bpe_tokenizer, get_template("digits"), 16, 4, 60)


def _file_of(tmp_path, *records):
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(records))
    return path


def test_lengths_are_those_of_training(meter, images, tmp_path):
    records = [_record("image", "coco/good.jpg"), _record("text", None), _record("long", None, "yes " * 40)]
    counts = check_data(_file_of(tmp_path, *records), images, meter=meter, allow_truncation=True).lengths
    dataset = SFTDataset(_file_of(tmp_path, *records), images, meter.tokenizer, None, "digits", 16, 4, 10_000)
    assert counts.longest == len(dataset[2]["input_ids"]) > 60
    assert (counts.records, counts.truncated, counts.unlabelled, counts.sampled) == (3, 1, 0, 3)
    assert sum(counts.histogram) == 3 and counts.histogram[-1] == 1
    assert counts.bin_edges() == [7, 15, 22, 30, 37, 45, 52, 60]


def test_every_record_that_could_be_too_long_is_measured_whatever_the_sample(meter, images, tmp_path):
    records = [_record(str(number), None) for number in range(50)]
    records[31] = _record("31", None, "yes " * 40)
    records[37] = _record("37", ["coco/good.jpg"] * 4)
    records[43]["conversations"][0]["value"] = "why " * 60
    report = check_data(_file_of(tmp_path, *records), images, meter=meter, num_sampled=5)
    assert (report.lengths.sampled, report.lengths.truncated, report.lengths.unlabelled) == (5, 3, 2)
    assert "record 37 (id '37'): The image tokens end at position" in report.errors[0]
    assert "record 43 (id '43'): no answer lies within 60 tokens" in report.errors[1]
    assert report.num_bad == 2 and not report.is_ok


def test_a_record_that_may_not_exceed_the_maximum_does_not(meter):
    generator = random.Random(0)
    for _ in range(200):
        words = ["".join(generator.choices("abz é漢\n😀<>", k=generator.randint(1, 9))) for _ in range(6)]
        talk = [{"from": ("human", "gpt")[n % 2], "value": f"x{word}"} for n, word in enumerate(words)]
        record = parse_record({"conversations": talk}, 0, "x.json")
        assert replace(meter, max_length=meter.measure(record)[0] - 1).may_exceed(record)


@pytest.mark.parametrize(
    ("num_long", "allow", "is_ok", "num_warnings"),
    [(0, False, True, 0), (1, False, True, 0), (2, False, True, 1), (20, False, True, 1), (21, False, False, 0),
     (21, True, True, 1), (100, True, True, 1)],
)  # fmt: skip
def test_many_cut_records_are_refused_and_some_are_said(meter, images, tmp_path, num_long, allow, is_ok, num_warnings):
    records = [_record(str(n), None, "yes " * 40 if n < num_long else "no") for n in range(100)]
    report = check_data(_file_of(tmp_path, *records), images, meter=meter, allow_truncation=allow)
    assert report.is_ok is is_ok and len(report.warnings) == num_warnings
    assert report.lengths.truncated_ratio == num_long / 100
    if not is_ok:
        with pytest.raises(DataError, match=r"21.0% of the records are longer than 60 tokens.*at most 20% may be"):
            report.raise_if_bad()


def test_progress_ends_at_the_number_of_records(data, images):
    calls = []
    check_data(data, images, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (12, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv_template": "vicuna9"}, "template 'vicuna9' is unknown; .*v1"),
        ({"on_missing": "ignore"}, "on_missing 'ignore' is unknown"),
        ({"output": "x.json"}, "on_missing='error' writes none"),
        ({"image_folder": "/no/such/folder"}, "is not a folder"),
        ({"data_path": "/no/such/file.json"}, "does not exist"),
        ({"on_missing": "drop", "output": "/no/such/folder/x.json"}, "output folder /no/such/folder does not exist"),
        ({"missing_list": "DATA"}, "is the data itself"),
        ({"on_missing": "drop", "output": "DATA"}, "is the input itself"),
    ],
)
def test_bad_arguments_are_refused_and_the_data_is_untouched(data, images, arguments, message):
    before = data.read_bytes()
    arguments = {name: data if value == "DATA" else value for name, value in arguments.items()}
    with pytest.raises(DataError, match=message):
        check_data(**{"data_path": data, "image_folder": images, **arguments})
    assert data.read_bytes() == before
