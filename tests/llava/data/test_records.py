"""Records are read one by one, and whatever is wrong with one is said in words of its own."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from llava.data import json_index
from llava.data.records import (
    DataError,
    ImageFileError,
    Record,
    RecordError,
    RecordFile,
    Turn,
    parse_record,
    resolve_image,
    source_of,
)

GOOD = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
        {"from": "gpt", "value": "White and red."},
        {"from": "human", "value": "Is it moving?"},
        {"from": "gpt", "value": "No."},
    ],
}
TEXT_ONLY = {"id": "a_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
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


def test_record_without_id_is_named_by_its_index():
    assert parse_record({"conversations": TEXT_ONLY["conversations"]}, 12, "x.json").id == "12"


@pytest.mark.parametrize(
    ("images", "source"),
    [([], "text"), (["a.jpg"], "."), (["./vg/VG_100K/1.jpg"], "vg"), (["text/1.jpg"], "text/"), (["a/b", "c/d"], "a")],
)
def test_source_is_the_first_folder_of_the_first_image(images, source):
    assert source_of(images) == source


@pytest.mark.parametrize("chunk_bytes", [1, 5, 64, 1 << 22])
@pytest.mark.parametrize("form", ["compact", "pretty", "lines", "crlf-lines", "bom"])
def test_file_gives_what_was_written(tmp_path, monkeypatch, chunk_bytes, form):
    monkeypatch.setattr(json_index, "CHUNK_BYTES", chunk_bytes)
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


def _changed(**changes) -> dict:
    return {**copy.deepcopy(GOOD), **changes}


def _message(number: int, **changes) -> dict:
    obj = copy.deepcopy(GOOD)
    obj["conversations"][number] = {**obj["conversations"][number], **changes}
    return obj


def _talk(*roles: str) -> dict:
    return {"id": "t", "conversations": [{"from": role, "value": "text"} for role in roles]}


BAD_OBJECTS = {
    "a list": ([1], "it is a list; an object"),
    "boolean id": (_changed(id=True), "'id' is a boolean"),
    "image number": (_changed(image=3), "'image' holds a number"),
    "image null in list": (_changed(image=[None]), "'image' holds a null"),
    "no image in list": (_changed(image=[]), "'image' is an empty list"),
    "empty image": (_changed(image=" "), "'image' is an empty name"),
    "NUL in image": (_changed(image="a/\0.jpg"), "holds a NUL character"),
    "web address": (_changed(image="https://x.org/a.jpg"), "is a web address"),
    "backslashes": (_changed(image="coco\\a.jpg"), "holds a backslash"),
    "absolute image": (_changed(image="/data/a.jpg"), "'/data/a.jpg' is an absolute path"),
    "Windows drive": (_changed(image="C:/data/a.jpg"), "'C:/data/a.jpg' is an absolute path"),
    "climbing image": (_changed(image="coco/../../a.jpg"), "climbs out with '..'"),
    "folder as image": (_changed(image="coco/"), "'coco/' names a folder"),
    "no conversations": ({"id": "t"}, "'conversations' is missing; .* Add it or drop the record"),
    "messages instead": ({"id": "t", "messages": []}, "there is 'messages'.* Rename 'messages'"),
    "conversations object": (_changed(conversations={}), "'conversations' is an object"),
    "empty conversations": (_changed(conversations=[]), "'conversations' is empty"),
    "message string": (_changed(conversations=["hi"]), r"conversations\[0\] is a string"),
    "no from": (_changed(conversations=[{"value": "x"}]), r"conversations\[0\] has no 'from'; 'human'"),
    "role for from": (_changed(conversations=[{"role": "user"}]), "it has 'role'"),
    "user role": (_message(0, **{"from": "user"}), "is from 'user'; .* Write 'human' instead"),
    "system role": (_message(0, **{"from": "system"}), "is from 'system'; .* Move its text"),
    "role list": (_message(0, **{"from": ["human"]}), r"is from \['human'\]"),
    "starts with gpt": (_talk("gpt", "human"), "starts with 'gpt'"),
    "two questions": (_talk("human", "human"), r"conversations\[1\] is a second 'human' in a row"),
    "two answers": (_talk("human", "gpt", "gpt"), r"conversations\[2\] is a second 'gpt' in a row"),
    "no answer": (_talk("human", "gpt", "human"), r"conversations\[2\] is a question without an answer"),
    "no value": (_changed(conversations=[{"from": "human"}]), "has no 'value'"),
    "null value": (_message(1, value=None), r"the value of conversations\[1\] is a null"),
    "number value": (_message(1, value=4), r"the value of conversations\[1\] is a number"),
    "half a surrogate": (_message(3, value="ab\ud83d"), "half a surrogate pair at character 2"),
    "empty question": (_message(2, value=" \n"), r"the question conversations\[2\] is empty"),
    "empty answer": (_message(3, value=""), r"the answer conversations\[3\] is empty"),
    "tag in answer": (_message(1, value="see <image>"), r"the answer conversations\[1\] contains '<image>'"),
    "tag without image": (_changed(image=None), "1 '<image>' in the questions but no 'image'"),
    "images for image": ({**_changed(images=["a"]), "image": None}, "Rename 'images' to 'image'"),
    "image without tag": (_message(0, value="what?"), r"1 image\(s\) but no '<image>'"),
    "two tags": (_message(2, value="<image>"), r"2 '<image>' in the questions for 1 image\(s\)"),
    "one tag for two": (_changed(image=["a/b.jpg", "c/d.jpg"]), r"1 '<image>' in the questions for 2 image\(s\)"),
}

_RECORD = json.dumps(TEXT_ONLY)
BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b"\xef\xbb\xbf \n", "is empty"),
    "gzip": (b"\x1f\x8b\x08\x00", "is gzip-compressed"),
    "zip": (b"PK\x03\x04", "is a zip archive"),
    "parquet": (b"PAR1", "is a Parquet file"),
    "utf-16": (json.dumps([GOOD]).encode("utf-16"), "is UTF-16 text"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "web page": (b"<!DOCTYPE html>", "is a web page"),
    "csv": (b"id,image\n1,a.jpg\n", "starts with b'id,image"),
    "empty array": (b"[ \n]", "holds an empty array"),
    "trailing comma in array": (f"[\n{_RECORD},\n]".encode(), f"a stray comma at line 2, column {len(_RECORD) + 1};"),
    "leading comma": (f"[,{_RECORD}]".encode(), "a stray comma at line 1, column 2"),
    "no comma": (f"[{_RECORD}\n  {_RECORD}]".encode(), "no comma at line 2, column 3 before element 1"),
    "number in array": (f"[{_RECORD},\n 12]".encode(), "'12' at line 2, column 2 .near element 1. is not a record"),
    "list in array": (f"[{_RECORD},\n [{_RECORD}]]".encode(), "element 1 at line 2, column 2 is an array"),
    "cut between records": (f"[{_RECORD},\n".encode(), "the array is not closed at the end of the file"),
    "cut in a record": (f"[{_RECORD},\n{_RECORD[:40]}".encode(), "record 1: the text ends early .* line 2"),
    "trailing comma in record": (b'[{"id": "1",\n}]', "record 0: a comma before a closing bracket"),
    "single quotes": (b"[{'id': 1}]", "record 0: invalid JSON .Expecting property name.* line 1, column 3"),
    "lost quote": (f"[{_RECORD},\n{_RECORD.replace('Hi', 'Hi' + chr(34), 1)}]".encode(), "record 1: invalid JSON"),
    "not UTF-8": (f"[{_RECORD.replace('Hi', 'Hé')}]".encode("latin-1"), "byte 0xe9 at line 1, column .* is not UTF-8"),
    "brace closes array": (f"[{_RECORD}}}".encode(), "'}' closes the array"),
    "two arrays": (f"[{_RECORD}]\n[{_RECORD}]".encode(), "more text follows the end of the array"),
    "object over lines": (b'{\n"data": [\n1\n]}', "line 1 opens an object that does not end on that line"),
    "line cut": (f"{_RECORD}\n{_RECORD[:50]}\n".encode(), "record 1: the text ends early .* line 2"),
    "line of a list": (f"{_RECORD}\n[1]\n".encode(), "record 1 is a list; an object"),
    "deep nesting": (b'{"a":' + b"[" * 200_000, "nested too deeply|the text ends early"),
}


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


def test_no_two_kinds_of_damage_share_a_message(tmp_path):
    messages = []
    for obj, _ in BAD_OBJECTS.values():
        with pytest.raises(RecordError) as caught:
            parse_record(obj, 5, "mix.json")
        messages.append(str(caught.value).partition("): ")[2])
    for case, (content, _) in BAD_FILES.items():
        with pytest.raises(DataError) as caught:
            _read_all(_file(tmp_path, content))
        if case != "blank":  # an empty file by another road
            messages.append(str(caught.value))
    assert len(messages) >= 60
    assert len(set(messages)) == len(messages)


def test_absent_file_and_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        RecordFile(tmp_path / "absent.json")
    with pytest.raises(DataError, match="is a folder"):
        RecordFile(tmp_path)


def test_damage_anywhere_never_ends_in_another_kind_of_error(tmp_path, monkeypatch):
    monkeypatch.setattr(json_index, "CHUNK_BYTES", 61)
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


def test_image_inside_the_folder_is_found(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.jpg").write_bytes(b"x")
    assert resolve_image(tmp_path, "coco/1.jpg") == (tmp_path / "coco" / "1.jpg").resolve()


def test_linked_image_folder_is_allowed_and_links_out_of_it_are_not(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (tmp_path / "real" / "in.jpg").write_bytes(b"x")
    (tmp_path / "real" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    assert resolve_image(tmp_path / "linked", "in.jpg").name == "in.jpg"
    with pytest.raises(ImageFileError, match="outside the image folder"):
        resolve_image(tmp_path / "linked", "out.jpg")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.jpg", "climbs out"),
        ("/etc/passwd", "absolute path"),
        ("coco/absent.jpg", "is not in"),
        ("coco", "is a folder in"),
        ("", "empty name"),
    ],
)
def test_other_image_names_are_refused(tmp_path, name, message):
    (tmp_path / "data" / "coco").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    with pytest.raises(ImageFileError, match=message):
        resolve_image(tmp_path / "data", name)
