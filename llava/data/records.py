"""Training records in LLaVA's format: located in their file once, then read and validated one at a time."""

from __future__ import annotations

import codecs
import json
import operator
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llava.constants import DEFAULT_IMAGE_TOKEN

QUESTION_ROLE, ANSWER_ROLE = "human", "gpt"
TEXT_SOURCE = "text"
_WHITESPACE = " \t\r\n"
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
_ROLE_HINTS = {"user": QUESTION_ROLE, "assistant": ANSWER_ROLE, "model": ANSWER_ROLE, "Human": QUESTION_ROLE}
_MEDIA_HINTS = dict.fromkeys(("images", "image_path", "Image"), "Rename '{}' to 'image'") | dict.fromkeys(
    ("video", "videos", "audio"), "Drop the record; '{}' is not read"
)
_FOREIGN_STARTS = (
    (b"\x1f\x8b", "is gzip-compressed", "decompress it first: gunzip FILE"),
    (b"PK\x03\x04", "is a zip archive", "unpack it first: unzip FILE"),
    (b"PAR1", "is a Parquet file", "export its rows to JSON Lines first"),
    (b"\xff\xfe", "is UTF-16 text", "save it again as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text", "save it again as UTF-8"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data itself", "fetch the data: git lfs pull"),
    (b"<", "is a web page (HTML or XML)", "download the raw file, not the page that shows it"),
)


class DataError(ValueError):
    """Says that training data, or the way it was asked for, is wrong in a way its owner can mend."""


class RecordError(DataError):
    """Says which record cannot be trained on, and why."""


@dataclass(frozen=True)
class Turn:
    """One question with its answer."""

    question: str  # text of the user, with its image tags
    answer: str  # text to train on, never empty, without image tags


@dataclass(frozen=True)
class Record:
    """One conversation."""

    index: int  # position in the file, from 0; with ``id`` it names the record, as ids repeat in public mixtures
    id: str  # the file's own identifier; the index where the file has none
    images: tuple[str, ...]  # image files relative to the image folder, one per image tag, in the order of the tags
    turns: tuple[Turn, ...]  # at least one
    source: str  # first folder of the first image, such as ``coco``; ``.`` without a folder; ``text`` without an image
    raw: dict  # the JSON object as read


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is none of the known ones. Raises DataError."""
    if value not in known:
        raise DataError(f"{what} '{value}' is unknown; {', '.join(known)} are allowed. Choose one of them.")


# ---- one record -----------------------------------------------------------------------------------------------------


def parse_record(obj: Any, index: int, path: str | Path) -> Record:
    """Turn a JSON object in LLaVA's format into a validated record.

    Args:
        obj: ``{"id", "image" (a name or a list of names, optional), "conversations": [{"from", "value"}, ...]}``.
        index: Position in the file, from 0.
        path: The file, for messages.

    Raises:
        RecordError: If a question lacks its answer, roles do not alternate, image tags and images differ in number, or
            a value has the wrong kind; naming file, index, id, what was found, what is allowed and what to do.

    >>> messages = [{"from": "human", "value": "<image>\\nWhich colour?"}, {"from": "gpt", "value": "Red."}]
    >>> record = parse_record({"id": 7, "image": "coco/1.jpg", "conversations": messages}, 0, "mix.json")
    >>> record.source, record.turns
    ('coco', (Turn(question='<image>\\nWhich colour?', answer='Red.'),))
    """
    try:
        if not isinstance(obj, dict):
            raise _problem(f"it is {_kind(obj)}", "an object {...} is needed", "Wrap it as {'conversations': [...]}")
        identifier = obj.get("id")
        if isinstance(identifier, bool) or not isinstance(identifier, str | int | None):
            raise _problem(
                f"'id' is {_kind(identifier)}", "text or a whole number is allowed", "Leave it out or mend it"
            )
        images, turns = image_names(obj), _turns(obj)
        _check_media(images, turns, obj)
    except DataError as problem:
        raise name_record(path, index, obj.get("id") if isinstance(obj, dict) else None, problem) from None
    return Record(index, str(index if identifier is None else identifier), images, turns, source_of(images), obj)


def name_record(path: str | Path, index: int, identifier: Any, problem: object) -> RecordError:
    """Put file, index and id of a record in front of what is wrong with it."""
    return RecordError(f"{path}: record {index} (id {identifier!r}): {problem}")


def image_names(obj: Mapping[str, Any]) -> tuple[str, ...]:
    """Give the image files that a record names. Raises DataError unless ``image`` is a relative path or a list."""
    value = obj.get("image")
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    if not names:
        raise _problem("'image' is an empty list", "a name or a list of names is allowed", "Leave 'image' out instead")
    for name in names:
        if not isinstance(name, str):
            raise _problem(f"'image' holds {_kind(name)}", "a name or a list of names is allowed", "Write a file name")
        check_image_name(name)
    return tuple(names)


def source_of(images: Sequence[str]) -> str:
    """Name the source of a record: the first folder of its first image.

    It is ``text`` without images and ``.`` for an image outside any folder. A folder that is itself called ``text``
    becomes ``text/``, so that ``text`` always means text only.

    >>> source_of(["coco/train2017/000000033471.jpg"])
    'coco'
    """
    if not images:
        return TEXT_SOURCE
    parts = [part for part in images[0].split("/") if part not in ("", ".")]
    source = parts[0] if len(parts) > 1 else "."
    return f"{source}/" if source == TEXT_SOURCE else source


# Whether a name is wrong, what is wrong with it, and the remedy; the first that applies is told.
_NAME_CHECKS: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (lambda name: not name.strip(), "'image' is an empty name", "Leave 'image' out for a text-only record"),
    (lambda name: "\0" in name, "image {name!r} holds a NUL character", "Rename the file"),
    (lambda name: name.startswith("data:") or "://" in name, "image '{name:.60}' is a web address", "Download it"),
    (lambda name: "\\" in name, "image '{name}' holds a backslash", "Replace every backslash by a forward slash"),
    (lambda name: name[:1] == "/" or name[1:2] == ":", "image '{name}' is an absolute path", "Cut its front off"),
    (lambda name: ".." in name.split("/"), "image '{name}' climbs out with '..'", "Choose a higher image folder"),
    (lambda name: name.endswith("/"), "image '{name}' names a folder", "Add the file name"),
)


def check_image_name(name: str) -> None:
    """Refuse a name that is no path inside the image folder. Raises DataError."""
    for is_wrong, found, remedy in _NAME_CHECKS:
        if is_wrong(name):
            allowed = "a path inside the image folder with forward slashes is allowed"
            raise _problem(found.format(name=name), allowed, remedy)


def _problem(found: str, allowed: str, remedy: str) -> DataError:
    """What is wrong with a record, before the record is named."""
    return DataError(f"{found}; {allowed}. {remedy}.")


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a null")


def _turns(obj: Mapping[str, Any]) -> tuple[Turn, ...]:
    shape = "a list of {'from', 'value'} is needed"
    messages = obj.get("conversations", ...)
    if messages is ...:
        near = next((key for key in ("conversation", "messages", "dialog", "text") if key in obj), None)
        hint, remedy = (f" (there is '{near}')", f"Rename '{near}'") if near else ("", "Add it or drop the record")
        raise _problem(f"'conversations' is missing{hint}", shape, remedy)
    if not isinstance(messages, list):
        raise _problem(f"'conversations' is {_kind(messages)}", shape, "Put the messages into a list")
    if not messages:
        raise _problem("'conversations' is empty", "at least one question and answer is needed", "Drop the record")
    # An answer to nothing, as ShareGPT has in front, is left out as in LLaVA.
    first = int(isinstance(messages[0], Mapping) and messages[0].get("from") == ANSWER_ROLE)
    texts = [_text(messages[n], f"conversations[{n}]", (n - first) % 2 == 1) for n in range(first, len(messages))]
    if not texts:
        raise _problem("'conversations' holds an answer and no question", "a question is needed", "Drop the record")
    if len(texts) % 2:
        where = f"conversations[{len(messages) - 1}]"
        raise _problem(f"{where} is a question without an answer", "each needs one", "Cut it off or drop the record")
    return tuple(map(Turn, texts[::2], texts[1::2]))


def _text(message: Any, where: str, is_answer: bool) -> str:
    """Give the text of one message after checking kind, role, place and content."""
    if not isinstance(message, Mapping):
        raise _problem(f"{where} is {_kind(message)}", "an object {'from', 'value'} is needed", "Wrap it as one")
    role, value = message.get("from"), message.get("value")
    if "from" not in message:
        near = "it has 'role', " if "role" in message else ""
        raise _problem(f"{where} has no 'from'", f"{near}'human' or 'gpt' is needed", "Add who speaks under 'from'")
    if role not in (QUESTION_ROLE, ANSWER_ROLE):
        known = _ROLE_HINTS.get(role) if isinstance(role, str) else None
        hint = f"Write '{known}' instead" if known else "Move its text into a question or drop the record"
        raise _problem(f"{where} is from {role!r}", "only 'human' and 'gpt' are allowed", hint)
    if role != (ANSWER_ROLE if is_answer else QUESTION_ROLE):
        raise _problem(f"{where} is a second '{role}' in a row", "'human' and 'gpt' must alternate", "Join the two")
    if "value" not in message:
        raise _problem(f"{where} has no 'value'", "a string is needed", "Add the text under 'value'")
    if not isinstance(value, str):
        raise _problem(f"the value of {where} is {_kind(value)}", "a string is needed", "Write it in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"the value of {where} holds half a surrogate pair at character {error.start}"
        raise _problem(problem, "whole Unicode characters are needed", "Remove that character") from None
    if not value.strip():
        what, needed = ("answer", "text to train on") if is_answer else ("question", "text or an image tag")
        raise _problem(f"the {what} {where} is empty", f"{needed} is needed", f"Write the {what} or drop the record")
    if is_answer and DEFAULT_IMAGE_TOKEN in value:
        remedy = "Move it to the question, or spell it differently if it is meant as text"
        raise _problem(f"the answer {where} contains '{DEFAULT_IMAGE_TOKEN}'", "only questions may hold it", remedy)
    return value


def _check_media(images: tuple[str, ...], turns: tuple[Turn, ...], obj: Mapping[str, Any]) -> None:
    """Refuse images and tags that differ in number, and media that training would not see."""
    key = next((key for key in _MEDIA_HINTS if obj.get(key)), None)
    if key and not images:
        remedy = _MEDIA_HINTS[key].format(key)
        raise _problem(f"there is '{key}' but no 'image'", "images are read from 'image' alone", remedy)
    tags, count = sum(turn.question.count(DEFAULT_IMAGE_TOKEN) for turn in turns), len(images)
    if tags == count:
        return
    problem, remedy = f"{tags} '{DEFAULT_IMAGE_TOKEN}' in the questions for {count} image(s)", "Make the two equal"
    if not count:
        problem = f"{tags} '{DEFAULT_IMAGE_TOKEN}' in the questions but no 'image'"
        remedy = "Name the image, or spell the tag otherwise if it is text"
    elif not tags:
        problem = f"{count} image(s) but no '{DEFAULT_IMAGE_TOKEN}' in the questions"
        remedy = f"Start the first question with '{DEFAULT_IMAGE_TOKEN}\\n'"
    raise _problem(problem, "there must be as many tags as images", remedy)


# ---- a file of records ----------------------------------------------------------------------------------------------


class RecordFile:
    """The records of one JSON array or JSON Lines file, parsed one at a time.

    Only byte offsets stay in memory, 16 bytes per record; while it locates the records of an array, its text does as
    well. The file is opened by each process when first needed, so a ``RecordFile`` can be handed to data-loader
    workers, however they are started.

    Args:
        path: UTF-8 file, with or without a byte order mark.

    Attributes:
        is_lines: True for JSON Lines, False for one JSON array.

    Raises:
        DataError: If the file is absent, empty, compressed, no list of objects, or cut off; with line and column.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "data.jsonl")
    ...     talk = [{"from": "human", "value": "Two and five?"}, {"from": "gpt", "value": "Seven."}]
    ...     _ = path.write_text(json.dumps({"id": "a", "conversations": talk}))
    ...     [(record.id, record.source, record.turns[0].answer) for record in RecordFile(path)]
    [('a', 'text', 'Seven.')]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._size, self.is_lines, begin = _recognise(self.path)
        spans = _line_spans(self.path, begin) if self.is_lines else _array_spans(self.path, begin)
        # First byte and one past the last byte of every record.
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        """Give one validated record; negative indices count from the end. Raises RecordError if it is unusable."""
        index = self._position(index)
        return parse_record(self.raw(index), index, self.path)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def raw(self, index: int) -> dict:
        """Give one JSON object without looking at what it says. Raises RecordError if it is not a JSON object."""
        index = self._position(index)
        obj = _parse_json(self.path, index, int(self._spans[index, 0]), self.raw_bytes(index))
        if not isinstance(obj, dict):
            what = f"record {index} is {_kind(obj)}; an object {{...}} is needed"
            raise RecordError(f"{self.path}: {what}. Write one per line.")
        return obj

    def raw_bytes(self, index: int) -> bytes:
        """Give the text of one record exactly as it stands in the file."""
        start, stop = self._spans[self._position(index)].tolist()
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            if os.fstat(self._descriptor).st_size != self._size:
                raise DataError(
                    f"{self.path} changed size since it was read ({self._size:,} bytes then); a file must stay "
                    "as it is while it is in use. Start again."
                )
        return os.pread(self._descriptor, stop - start, start)  # leaves no shared file position behind: fork-safe

    def _position(self, index: int) -> int:
        index, length = operator.index(index), len(self)
        if not -length <= index < length:
            raise IndexError(f"{self.path} has no record {index}; 0 to {length - 1} are there. Use one of these.")
        return index % length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}  # a descriptor means nothing in another process

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]  # checked in the line above


def _recognise(path: Path) -> tuple[int, bool, int]:
    """Size of a file, whether it is JSON Lines, and the byte where its text begins."""
    try:
        with open(path, "rb") as handle:
            size, head = os.fstat(handle.fileno()).st_size, handle.read(1 << 16)
    except OSError as error:
        known = {FileNotFoundError: "does not exist", IsADirectoryError: "is a folder"}
        problem = known.get(type(error), f"cannot be read ({error.strerror})")
        needed = "a readable JSON or JSON Lines file is needed"
        raise DataError(f"{path} {problem}; {needed}. Check the path, or download it.") from None
    begin = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    text = head[begin:].lstrip(_WHITESPACE.encode())
    if not text:
        raise DataError(f"{path} is empty ({size:,} bytes); at least one record is needed. Download it again.")
    for magic, kind, remedy in _FOREIGN_STARTS:
        if text.startswith(magic):
            raise DataError(f"{path} {kind}; a JSON array or JSON Lines is needed. Please {remedy}.")
    if text[:1] not in (b"{", b"["):
        raise DataError(
            f"{path} starts with {text[:20]!r}; '[' (an array of records) or '{{' (JSON Lines) is allowed. "
            "Check that this is the right file."
        )
    return size, text[:1] == b"{", begin


def _line_spans(path: Path, begin: int) -> array:
    """Begin and end of every line with text, in bytes, one after the other."""
    spans, start, first = array("q"), begin, b""
    with open(path, "rb") as handle:
        handle.seek(begin)
        for line in handle:
            stripped = line.strip(_WHITESPACE.encode())
            if stripped:
                first = first or stripped
                lead = start + line.index(stripped)
                spans.extend((lead, lead + len(stripped)))
            start += len(line)
    if first.endswith(b","):
        raise DataError(
            f"{path}: a comma after the record at {_place(path, spans[1] - 1)}; JSON Lines has nothing between its "
            "lines. Remove the commas, or put [ and ] around the whole."
        )
    if len(spans) > 2 and not first.endswith(b"}"):
        raise DataError(
            f"{path}: line 1 opens an object that does not end on that line; JSON Lines has one whole record per line. "
            "Write one record per line, or put the records into an array: [ {...}, {...} ]."
        )
    return spans


_GAP = re.compile(r"[ \t\r\n,]*")
# Only where a record ends is wanted: numbers stay text, however long they are.
_SCANNER = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


def _array_spans(path: Path, begin: int) -> array:
    """Begin and end of every record of a JSON array, in bytes, one after the other."""
    # In Latin-1 each byte is a character, so that positions are byte offsets; what JSON itself writes is ASCII.
    text = str(np.memmap(path, np.uint8, "r").data, "latin-1")
    spans, stop = array("q"), text.index("[", begin) + 1
    while True:
        gap = _GAP.match(text, stop)
        start = gap.end() if gap else stop
        commas, char = text.count(",", stop, start), text[start : start + 1]
        if char == "]" and spans and not commas:
            break
        if char != "{" or commas != bool(spans):
            _refuse_gap(path, text, stop, start, len(spans) // 2)
        try:
            # Each record is dropped again: all of them as objects would take ten times the file.
            stop = _SCANNER.raw_decode(text, start)[1]
        except (json.JSONDecodeError, RecursionError):
            _parse_json(path, len(spans) // 2, start, text[start:].encode("latin-1"))
            raise
        spans.extend((start, stop))
    rest = text[start + 1 :].lstrip(_WHITESPACE)
    if rest:
        place = _place(path, len(text) - len(rest))
        raise DataError(f"{path}: more text follows the end of the array at {place}; one is allowed. Join the arrays.")
    return spans


# What stands where a record or the end of the array should, by its first character.
_GAP_PROBLEMS = {
    "": "the array is not closed at the end of the file ({place}); ']' is needed there. Get the file again or add it.",
    "{": "no comma at {place} before element {index}; records are separated by one. Add a comma.",
    "[": "element {index} at {place} is an array; every element must be an object. Unpack the inner array.",
    "}": "'}}' closes the array at {place}; ']' is needed there. Mend it.",
    "]": "this holds an empty array; at least one record is needed. Check how it was made.",
}
_NO_RECORD = (
    "{word!r} at {place} (near element {index}) is not a record; every element must be an object {{...}}. Remove it, "
    "or look for an unbalanced quote or bracket before it."
)
_STRAY_COMMA = "a stray comma at {place}, {side}; single commas between records are allowed. Remove it."


def _refuse_gap(path: Path, text: str, stop: int, start: int, index: int) -> NoReturn:
    """Say what is wrong between the end of a record at ``stop`` and what follows it at ``start``."""
    commas, char = text.count(",", stop, start), text[start : start + 1]
    problem, word, side = _GAP_PROBLEMS.get(char, _NO_RECORD), re.split(r"[\s,\]}]", text[start : start + 30])[0], ""
    if commas > (index > 0) or (commas and char == "]"):
        problem, start = _STRAY_COMMA, text.index(",", stop)
        side = "before the first one" if not index else "between two records" if char == "{" else "after the last one"
    details = {"place": _place(path, start), "index": index, "word": word, "side": side}
    raise DataError(f"{path}: {problem.format(**details)}")


def _parse_json(path: Path, index: int, start: int, data: bytes) -> Any:
    """Parse the text of a record, which stands at byte ``start``. Raises RecordError with line and column."""
    try:
        text = data.decode("utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        place = _place(path, start + error.start)
        problem = f"byte 0x{data[error.start]:02x} at {place} is not UTF-8; only UTF-8 text is allowed"
        remedy = "Convert the file: iconv -t UTF-8"
    except json.JSONDecodeError as error:
        before, rest = text[: error.pos].rstrip(), text[error.pos :].lstrip()
        problem, remedy = f"invalid JSON ({error.msg})", "Mend the text there"
        if before.endswith(",") and rest[:1] in ("}", "]") or "trailing comma" in error.msg:
            problem, remedy = "a comma before a closing bracket, which JSON does not allow,", "Remove that comma"
        elif not rest or error.msg.startswith("Unterminated string"):
            problem, remedy = f"the text ends early ({error.msg})", "Download the file again, or close what is open"
        problem += f" at {_place(path, start + len(text[: error.pos].encode()))}; each record is one JSON object"
    except RecursionError:
        problem, remedy = "nested too deeply; flat records are allowed", "Remove the nesting"
    except ValueError:  # Python refuses to convert numbers of thousands of digits
        problem = f"a number of too many digits at {_place(path, start)}; shorter ones are allowed"
        remedy = "Shorten it or drop the record"
    raise RecordError(f"{path}: record {index}: {problem}. {remedy}.")


def _place(path: Path, offset: int) -> str:
    """Line and column of a byte as editors count them: from 1, columns in characters."""
    with open(path, "rb") as handle:
        before = handle.read(offset)
    lines = before.split(b"\n")
    return f"line {len(lines)}, column {len(lines[-1].decode('utf-8-sig', errors='replace')) + 1}"
