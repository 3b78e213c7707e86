"""Named kinds of corrupt training data, each with what its owner is told."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

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
    "answer alone": (_talk("gpt"), "holds an answer and no question"),
    "two answers first": (_talk("gpt", "gpt"), r"conversations\[1\] is a second 'gpt' in a row"),
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
    "video": ({**TEXT_ONLY, "video": "a.mp4"}, "there is 'video' but no 'image'; .* Drop the record"),
    "capital image": ({**TEXT_ONLY, "Image": "a.jpg"}, "there is 'Image' but no 'image'; .* Rename 'Image'"),
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
    "trailing comma in array": (
        f"[\n{_RECORD},\n]".encode(),
        f"a stray comma at line 2, column {len(_RECORD) + 1}, after the last one",
    ),
    "leading comma": (f"[,{_RECORD}]".encode(), "a stray comma at line 1, column 2, before the first"),
    "two commas": (f"[{_RECORD},,{_RECORD}]".encode(), "a stray comma at line 1, .* between two records"),
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
    "lines with commas": (f"{_RECORD},\n{_RECORD}".encode(), "a comma after the record at line 1, column"),
    "endless number": (
        f'{_RECORD}\n{{"id": {"9" * 5000}}}'.encode(),
        "record 1: a number of too many digits at line 2",
    ),
    "line of a list": (f"{_RECORD}\n[1]\n".encode(), "record 1 is a list; an object"),
    "deep nesting": (b'{"a":' + b"[" * 200_000, "nested too deeply|the text ends early"),
}


def _encode(kind: str, size: tuple[int, int] = (64, 64)) -> bytes:
    """A picture with detail in every row, so that its file can be cut."""
    picture, buffer = Image.effect_noise(size, 90).convert("RGB"), io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def _cut(kind: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        whole = _encode(kind)
        place.write_bytes(whole[: len(whole) // 2])

    return make


def _flip_a_byte(place: Path) -> None:
    whole = bytearray(_encode("PNG"))
    whole[len(whole) // 2] ^= 0xFF
    place.write_bytes(whole)


# kind -> how the image of record 0, "coco/1.jpg", is made, its state, what is said; None stands for no file at all
BAD_IMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no file": (lambda place: None, "missing", "Image 'coco/1.jpg' is not in"),
    "no bytes": (lambda place: place.touch(), "empty", "Image 'coco/1.jpg' has zero bytes"),
    "folder": (lambda place: place.mkdir(), "missing", "Image 'coco/1.jpg' is a folder"),
    "page saved as image": (lambda place: place.write_text("<html>gone"), "corrupt", "not a known image format"),
    "cut JPEG": (_cut("JPEG"), "corrupt", "does not decode .JPEG"),
    "cut PNG": (_cut("PNG"), "corrupt", "does not decode .PNG"),
    "cut GIF": (_cut("GIF"), "corrupt", "does not decode .GIF"),
    "cut WEBP": (_cut("WEBP"), "corrupt", "does not decode .WEBP"),
}

# found by decoding alone
DAMAGED_IMAGES = {"flipped byte": (_flip_a_byte, "corrupt", "does not decode .PNG")}
