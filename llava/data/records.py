"""A training record: one conversation with its images, validated, read from disk one at a time."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.json_index import DataError, build_index, parse_json

__all__ = [
    "DataError",
    "ImageFileError",
    "Record",
    "RecordError",
    "RecordFile",
    "Turn",
    "image_names",
    "parse_record",
    "resolve_image",
    "source_of",
]

QUESTION_ROLE, ANSWER_ROLE = "human", "gpt"
TEXT_SOURCE = "text"
_ROLE_HINTS = {"user": QUESTION_ROLE, "assistant": ANSWER_ROLE, "model": ANSWER_ROLE, "Human": QUESTION_ROLE}


class RecordError(DataError):
    """Says which record cannot be trained on, and why."""


class ImageFileError(DataError):
    """Says why an image named by a record cannot be opened from the image folder."""


@dataclass(frozen=True)
class Turn:
    """One question with its answer.

    Attributes:
        question: Text of the human, with its image tags.
        answer: Text to train on, never empty, without image tags.
    """

    question: str
    answer: str


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        index: Position in the file, from 0; with ``id`` it names the record, as ids repeat in public mixtures.
        id: The file's own identifier; the index where the file has none.
        images: Image files relative to the image folder, one per image tag, in the order of the tags.
        turns: At least one.
        source: First folder of the first image, such as ``coco``; ``.`` without a folder; ``text`` without an image.
        raw: The JSON object as read.
    """

    index: int
    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    source: str
    raw: dict


def parse_record(obj: Any, index: int, path: str | Path) -> Record:
    """Turn a JSON object in LLaVA's format into a validated record.

    Args:
        obj: ``{"id", "image" (a name or a list of names, optional), "conversations": [{"from", "value"}, ...]}``.
        index: Position in the file, from 0.
        path: The file, for messages.

    Raises:
        RecordError: If a question lacks its answer, roles do not alternate, image tags and images differ in number, or
            a value has the wrong kind; naming file, index, id, what was found, what is allowed and what to do.
    """
    try:
        identifier = _identifier(obj, index)
        images = image_names(obj)
        turns = _turns(obj)
        _check_tags(images, turns, obj)
    except _Problem as problem:
        identifier = obj.get("id") if isinstance(obj, Mapping) else None
        raise RecordError(f"{path}: record {index} (id {identifier!r}): {problem}") from None
    return Record(index, identifier, images, turns, source_of(images), obj)


def image_names(obj: Mapping[str, Any]) -> tuple[str, ...]:
    """Give the image files that a record names, relative to the image folder.

    Raises:
        DataError: If ``image`` is neither a relative path nor a list of them.
    """
    value = obj.get("image")
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    if not names:
        raise _Problem("'image' is an empty list", "a name or a list of names is allowed", "Leave 'image' out instead")
    for name in names:
        if not isinstance(name, str):
            raise _Problem(f"'image' holds {_kind(name)}", "a name or a list of names is allowed", "Write a file name")
        _check_image_name(name)
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


def resolve_image(image_folder: str | Path, relative: str) -> Path:
    """Find an image inside the image folder.

    Args:
        image_folder: Folder that all image names are relative to.
        relative: Name as written in a record, with forward slashes.

    Returns:
        Path of an existing file below ``image_folder``, links resolved.

    Raises:
        ImageFileError: If the name is absolute, climbs out of the folder, follows a link out of it, or names no file.
    """
    try:
        _check_image_name(relative)
    except _Problem as problem:
        raise ImageFileError(str(problem)) from None
    folder = Path(os.path.realpath(image_folder))
    found = Path(os.path.realpath(folder / relative))
    if not found.is_relative_to(folder):
        raise ImageFileError(
            f"Image '{relative}' is a link to '{found}', outside the image folder '{folder}'; only files inside it are "
            "allowed. Move the file there, or name the folder above both as the image folder."
        )
    if not found.exists():
        raise ImageFileError(
            f"Image '{relative}' is not in '{folder}'; every image a record names must be there. "
            "Download it, or drop the record."
        )
    if not found.is_file():
        raise ImageFileError(
            f"Image '{relative}' is a folder in '{folder}'; a record must name a file. Correct the name in the record."
        )
    return found


class RecordFile(Sequence):
    """The records of one JSON array or JSON Lines file, parsed one at a time.

    Only byte offsets stay in memory, 16 bytes per record. The file is opened by each process when first needed, so a
    ``RecordFile`` can be handed to data-loader workers, however they are started.

    Args:
        path: UTF-8 file.

    Raises:
        DataError: If the file cannot be read or is not a list of objects; with line and column.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._index = build_index(self.path)
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._index.spans)

    def __getitem__(self, index: int) -> Record:
        """Give one validated record; negative indices count from the end. Raises RecordError if it is unusable."""
        index = self._position(index)
        return parse_record(self.raw(index), index, self.path)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    @property
    def is_lines(self) -> bool:
        """True for JSON Lines, False for one JSON array."""
        return self._index.is_lines

    def raw(self, index: int) -> dict:
        """Give one JSON object without looking at what it says. Raises RecordError if it is not a JSON object."""
        index = self._position(index)
        start = int(self._index.spans[index, 0])
        try:
            obj = parse_json(self.path, start, self.raw_bytes(index), f"record {index}")
        except DataError as error:
            raise RecordError(str(error)) from None
        if not isinstance(obj, dict):
            raise RecordError(
                f"{self.path}: record {index} is {_kind(obj)}; an object {{...}} is needed. Write a record per line."
            )
        return obj

    def raw_bytes(self, index: int) -> bytes:
        """Give the text of one record exactly as it stands in the file."""
        start, stop = self._index.spans[self._position(index)].tolist()
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            if os.fstat(self._descriptor).st_size != self._index.size:
                raise DataError(
                    f"{self.path} changed size since it was read ({self._index.size:,} bytes then); a file must stay "
                    "as it is while it is in use. Start again."
                )
        return os.pread(self._descriptor, stop - start, start)  # leaves no shared file position behind: fork-safe

    def _position(self, index: int) -> int:
        index, length = operator.index(index), len(self)
        if not -length <= index < length:
            raise IndexError(f"{self.path} has no record {index}; 0 to {length - 1} are there. Use one of these.")
        return index % length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)


class _Problem(DataError):
    """A finding before its record is named."""

    def __init__(self, found: str, allowed: str, remedy: str) -> None:
        super().__init__(f"{found}; {allowed}. {remedy}.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "a null")


def _identifier(obj: Any, index: int) -> str:
    if not isinstance(obj, Mapping):
        raise _Problem(f"it is {_kind(obj)}", "an object {...} is needed", "Wrap it as {'conversations': [...]}")
    identifier = obj.get("id")
    if identifier is None:
        return str(index)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise _Problem(f"'id' is {_kind(identifier)}", "text or a whole number is allowed", "Leave it out or mend it")
    return str(identifier)


def _check_image_name(name: str) -> None:
    allowed = "a path inside the image folder with forward slashes is allowed"
    parts = PurePosixPath(name).parts
    if not name.strip():
        raise _Problem("'image' is an empty name", allowed, "Leave 'image' out for a text-only record")
    if "\0" in name:
        raise _Problem(f"image {name!r} holds a NUL character", allowed, "Rename the file")
    if "://" in name or name.startswith("data:"):
        raise _Problem(f"image '{name[:60]}' is a web address", allowed, "Download it and name the local file")
    if "\\" in name:
        raise _Problem(f"image '{name}' holds a backslash", allowed, "Replace every backslash by a forward slash")
    if name.startswith("/") or PurePosixPath(name).is_absolute() or name[1:2] == ":":
        raise _Problem(f"image '{name}' is an absolute path", allowed, "Cut the image folder off its front")
    if ".." in parts:
        raise _Problem(f"image '{name}' climbs out with '..'", allowed, "Choose a higher image folder instead")
    if name.endswith("/"):
        raise _Problem(f"image '{name}' names a folder", allowed, "Add the file name")


def _turns(obj: Mapping[str, Any]) -> tuple[Turn, ...]:
    shape = "a list of {'from', 'value'} is needed"
    if "conversations" not in obj:
        near = next((key for key in ("conversation", "messages", "dialog", "text") if key in obj), None)
        found = "'conversations' is missing" + (f" (there is '{near}')" if near else "")
        raise _Problem(found, shape, f"Rename '{near}'" if near else "Add it or drop the record")
    messages = obj["conversations"]
    if not isinstance(messages, list):
        raise _Problem(f"'conversations' is {_kind(messages)}", shape, "Put the messages into a list")
    if not messages:
        raise _Problem("'conversations' is empty", "at least one question and answer is needed", "Drop the record")
    first = _first_question(messages)
    texts = [_text(message, number, first) for number, message in enumerate(messages)][first:]
    if len(texts) % 2:
        raise _Problem(
            f"conversations[{len(messages) - 1}] is a question without an answer",
            "every question needs one",
            "Cut it off or drop the record",
        )
    if not texts:
        raise _Problem(
            "'conversations' holds an answer and no question", "a question must come first", "Drop the record"
        )
    turns = tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=True))
    for number, turn in enumerate(turns):
        where = f"conversations[{first + 2 * number + 1}]"
        if not turn.question.strip():
            raise _Problem(
                f"the question conversations[{first + 2 * number}] is empty",
                "text or an image tag is needed",
                "Write the question or drop the record",
            )
        if not turn.answer.strip():
            raise _Problem(
                f"the answer {where} is empty", "there must be text to train on", "Write the answer or drop the record"
            )
        if DEFAULT_IMAGE_TOKEN in turn.answer:
            raise _Problem(
                f"the answer {where} contains '{DEFAULT_IMAGE_TOKEN}'",
                "only questions may hold image tags",
                "Move it to the question, or spell it differently if it is meant as text",
            )
    return turns


def _first_question(messages: list[Any]) -> int:
    """Where the first question stands: an answer to nothing, as ShareGPT has in front, is left out as in LLaVA."""
    opening = messages[0]
    return int(isinstance(opening, Mapping) and opening.get("from") == ANSWER_ROLE)


def _text(message: Any, number: int, first: int) -> str:
    """Give the text of one message after checking its kind, its role and its place."""
    where = f"conversations[{number}]"
    if not isinstance(message, Mapping):
        raise _Problem(f"{where} is {_kind(message)}", "an object {'from', 'value'} is needed", "Wrap it as one")
    if "from" not in message:
        near = "it has 'role', " if "role" in message else ""
        raise _Problem(f"{where} has no 'from'", f"{near}'human' or 'gpt' is needed", "Add who speaks under 'from'")
    role, expected = message["from"], ANSWER_ROLE if (number - first) % 2 else QUESTION_ROLE
    if role not in (QUESTION_ROLE, ANSWER_ROLE):
        near = _ROLE_HINTS.get(role) if isinstance(role, str) else None
        hint = f"Write '{near}' instead" if near else "Move its text into a question or drop the record"
        raise _Problem(f"{where} is from {role!r}", "only 'human' and 'gpt' are allowed", hint)
    if role != expected:
        raise _Problem(f"{where} is a second '{role}' in a row", "'human' and 'gpt' must alternate", "Join the two")
    if "value" not in message:
        raise _Problem(f"{where} has no 'value'", "a string is needed", "Add the text under 'value'")
    value = message["value"]
    if not isinstance(value, str):
        raise _Problem(f"the value of {where} is {_kind(value)}", "a string is needed", "Write it in quotes")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"the value of {where} holds half a surrogate pair at character {error.start}"
            raise _Problem(found, "whole Unicode characters are needed", "Remove that character") from None
    return value


def _check_tags(images: tuple[str, ...], turns: tuple[Turn, ...], obj: Mapping[str, Any]) -> None:
    tags = sum(turn.question.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
    if tags == len(images):
        return
    allowed = "there must be as many tags as images"
    if not images:
        near = next((key for key in ("images", "video", "image_path") if key in obj), None)
        remedy = f"Rename '{near}' to 'image'" if near else "Name the image, or spell the tag otherwise if it is text"
        raise _Problem(f"{tags} '{DEFAULT_IMAGE_TOKEN}' in the questions but no 'image'", allowed, remedy)
    if not tags:
        raise _Problem(
            f"{len(images)} image(s) but no '{DEFAULT_IMAGE_TOKEN}' in the questions",
            allowed,
            f"Start the first question with '{DEFAULT_IMAGE_TOKEN}\\n'",
        )
    raise _Problem(
        f"{tags} '{DEFAULT_IMAGE_TOKEN}' in the questions for {len(images)} image(s)", allowed, "Make the two equal"
    )
