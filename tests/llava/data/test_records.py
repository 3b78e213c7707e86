"""Records are read one by one, and whatever is wrong with one is said in words of its own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from corrupt_inputs import BAD_FILES, BAD_OBJECTS, GOOD, TEXT_ONLY
from llava.data.records import (
    DataError,
    Record,
    RecordError,
    RecordFile,
    Turn,
    parse_record,
    source_of,
)

AWKWARD = {
    "id": 7,
    "image": ["vg/VG_100K/1.jpg", "gqa/images/2.jpg"],
    "conversations": [
        {"from": "human", "value": 'é 漢 😀 <image><image> "\\" \\\\ ]}, {['},
        {"from": "gpt", "value": "\n\t\\"},
    ],
}


def test_record_has_literal_content():
    assert parse_record(GOOD, 3, "x.json") == Record(
        index=3,
        id="000000033471",
        images=("coco/train2017/000000033471.jpg",),
        turns=(Turn("<image>\nWhat are the colors of the bus?", "White and red."), Turn("Is it moving?", "No.")),
        source="coco",
        raw=GOOD,
    )


def test_text_only_record_has_no_image():
    record = parse_record(TEXT_ONLY, 0, "x.json")
    assert (record.images, record.source, record.turns) == ((), "text", (Turn("Hi", "Yo"),))


def test_an_answer_before_the_first_question_is_left_out_as_in_llava():
    opening = {"from": "gpt", "value": "How can I help?"}
    record = parse_record({"id": "s", "conversations": [opening, *TEXT_ONLY["conversations"]]}, 0, "x.json")
    assert record.turns == (Turn("Hi", "Yo"),)
    talk = [opening, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]
    with pytest.raises(RecordError, match=r"the answer conversations\[2\] is empty"):
        parse_record({"id": "s", "conversations": talk}, 0, "x.json")


def test_record_without_id_is_named_by_its_index():
    assert parse_record({"conversations": TEXT_ONLY["conversations"]}, 12, "x.json").id == "12"


@pytest.mark.parametrize(
    ("images", "source"),
    [([], "text"), (["a.jpg"], "."), (["./vg/VG_100K/1.jpg"], "vg"), (["text/1.jpg"], "text/"), (["a/b", "c/d"], "a")],
)
def test_source_is_the_first_folder_of_the_first_image(images, source):
    assert source_of(images) == source


@pytest.mark.parametrize("form", ["compact", "pretty", "lines", "crlf-lines", "bom"])
def test_file_gives_what_was_written(tmp_path, form):
    objects = [GOOD, TEXT_ONLY, AWKWARD] * 3
    text = {
        "compact": json.dumps(objects),
        "pretty": "\n " + json.dumps(objects, indent=2, ensure_ascii=False) + "\n",
        "lines": "\n".join(json.dumps(obj, ensure_ascii=False) for obj in objects),
        "crlf-lines": "\r\n\r\n".join(json.dumps(obj) for obj in objects) + "\r\n",
        "bom": "\ufeff" + json.dumps(objects),
    }[form]
    path = tmp_path / "data.json"
    path.write_bytes(text.encode())
    records = RecordFile(path)
    assert len(records) == 9
    assert [records.raw(index) for index in range(9)] == objects
    assert [record.raw for record in records] == objects
    assert records[-1] == records[8] == records[np.int64(8)]
    assert json.loads(records.raw_bytes(2)) == AWKWARD


def test_index_beyond_the_end_is_refused(tmp_path):
    records = RecordFile(_file(tmp_path, json.dumps([GOOD])))
    with pytest.raises(IndexError, match="no record 1; 0 to 0 are there"):
        records[1]


def test_file_survives_pickling_with_an_open_descriptor(tmp_path):
    records = RecordFile(_file(tmp_path, json.dumps([GOOD, TEXT_ONLY])))
    assert records[0].id == "000000033471"
    assert pickle.loads(pickle.dumps(records))[1].id == "a_0"


def test_file_that_changed_after_indexing_is_refused(tmp_path):
    path = _file(tmp_path, json.dumps([GOOD]))
    records = RecordFile(path)
    path.write_text(json.dumps([GOOD, GOOD]))
    with pytest.raises(DataError, match="changed size since it was read"):
        records[0]


def test_forked_readers_do_not_disturb_each_other(tmp_path):
    records = RecordFile(_file(tmp_path, json.dumps([GOOD, TEXT_ONLY] * 50)))
    assert records[0].id == "000000033471"
    child = os.fork()
    if child == 0:
        os._exit(0 if all(records[i].raw in (GOOD, TEXT_ONLY) for i in range(100)) else 1)
    assert all(records[i].raw == (GOOD, TEXT_ONLY)[i % 2] for i in range(100))
    assert os.waitpid(child, 0)[1] == 0


def test_reading_records_does_not_import_torch():
    code = "import sys, llava.data.records, llava.data.check, llava.data.subset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _file(folder, content):
    path = folder / "data.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _read_all(path) -> None:
    for _ in RecordFile(path):
        pass


@pytest.mark.parametrize("case", BAD_OBJECTS)
def test_bad_record_is_refused_with_file_index_and_id(case):
    obj, message = BAD_OBJECTS[case]
    identifier = obj.get("id") if isinstance(obj, dict) else None
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(obj, 5, "mix.json")
    assert str(caught.value).startswith(f"mix.json: record 5 (id {identifier!r}): ")
    found, _, rest = str(caught.value).partition("; ")
    assert found and ". " in rest, "found; allowed. remedy."


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_with_its_name(case, tmp_path):
    content, message = BAD_FILES[case]
    path = _file(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        _read_all(path)
    assert str(path) in str(caught.value)


def test_absent_file_and_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        RecordFile(tmp_path / "absent.json")
    with pytest.raises(DataError, match="is a folder"):
        RecordFile(tmp_path)


def test_damage_anywhere_never_ends_in_another_kind_of_error(tmp_path):
    generator = np.random.default_rng(0)
    pieces = [b"{", b"}", b"[", b"]", b'"', b",", b"\\", b"null", b"\n", b"\xff", b"\x00"]
    original = json.dumps([GOOD, TEXT_ONLY], indent=1).encode()
    for _ in range(300):
        at, length = generator.integers(len(original)), generator.integers(4)
        damaged = original[:at] + pieces[generator.integers(len(pieces))] + original[at + length :]
        try:
            _read_all(_file(tmp_path, damaged))
        except DataError:
            continue
        assert isinstance(json.loads(damaged), list)
