"""Byte offsets of the records in a JSON array or JSON Lines file, found without holding the file in memory."""

from __future__ import annotations

import json
import os
import re
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHUNK_BYTES = 1 << 22
_WHITESPACE = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SEPARATOR = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*")
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


@dataclass(frozen=True)
class JsonIndex:
    """Where each record of one file lies.

    Attributes:
        spans: First byte and one past the last byte of every record, int64, (records, 2).
        is_lines: True for JSON Lines, False for one JSON array.
        size: Bytes of the file when it was read.
    """

    spans: np.ndarray
    is_lines: bool
    size: int


def build_index(path: str | Path) -> JsonIndex:
    """Find every record of a JSON array of objects or a JSON Lines file.

    The file is read once, 4 MB at a time; records are located here and parsed later, one by one.

    Args:
        path: UTF-8 file, with or without a byte order mark.

    Returns:
        The byte span of each record, in file order.

    Raises:
        DataError: If the file is absent, empty, compressed, not a list of objects, or cut off; with line and column.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; a JSON or JSON Lines file is needed. Name the file inside it.")
    if not path.exists():
        raise DataError(f"{path} does not exist; a JSON or JSON Lines file is needed. Check the path or download it.")
    try:
        size, head = path.stat().st_size, _read(path, 0, 1 << 16)
    except OSError as error:
        found = f"{path} cannot be read ({error.strerror})"
        raise DataError(f"{found}; a readable file is needed. Check its rights.") from None
    begin = len(_BYTE_ORDER_MARK) if head.startswith(_BYTE_ORDER_MARK) else 0
    first = head[begin:].lstrip(_WHITESPACE)
    if not first:
        raise DataError(f"{path} is empty ({size:,} bytes); at least one record is needed. Download it again.")
    for magic, found, remedy in _FOREIGN_STARTS:
        if first.startswith(magic):
            raise DataError(f"{path} {found}; a JSON array or JSON Lines is needed. Please {remedy}.")
    if first[:1] == b"{":
        return JsonIndex(_line_spans(path, begin), True, size)
    if first[:1] == b"[":
        return JsonIndex(_array_spans(path, size), False, size)
    raise DataError(
        f"{path} starts with {first[:20]!r}; '[' (an array of records) or '{{' (JSON Lines) is allowed. "
        "Check that this is the right file."
    )


def position_of(path: str | Path, offset: int, extra: str = "") -> tuple[int, int]:
    """Turn a byte offset into a line and column as editors count them.

    Args:
        path: UTF-8 file.
        offset: Byte in [0, size].
        extra: Text that follows the offset; the position at its end is returned.

    Returns:
        Line and column, both counted from 1, the column in characters.
    """
    line, line_start, done = 1, 0, 0
    with open(path, "rb") as handle:
        while done < offset:
            chunk = handle.read(min(CHUNK_BYTES, offset - done))
            if not chunk:
                break
            line += chunk.count(b"\n")
            if b"\n" in chunk:
                line_start = done + chunk.rfind(b"\n") + 1
            done += len(chunk)
    prefix = _read(path, line_start, offset - line_start).decode("utf-8-sig", errors="replace") + extra
    return line + prefix.count("\n"), len(prefix) - (prefix.rfind("\n") + 1) + 1


def parse_json(path: str | Path, start: int, data: bytes, name: str) -> object:
    """Parse the JSON text of one record.

    Args:
        path: File it came from, for the message.
        start: Offset of ``data`` in the file.
        data: The text, UTF-8.
        name: What the text is, such as ``record 7``.

    Raises:
        DataError: If it is not UTF-8 or not JSON; with line and column.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = position_of(path, start + error.start)
        raise DataError(
            f"{path}: {name}: byte 0x{data[error.start]:02x} at line {line}, column {column} is not UTF-8; only UTF-8 "
            "text is allowed. Convert the file: iconv -t UTF-8."
        ) from None
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{path}: {name}: nested too deeply; flat records are allowed. Remove the nesting.") from None
    except json.JSONDecodeError as error:
        line, column = position_of(path, start, text[: error.pos])
        before, rest = text[: error.pos].rstrip(), text[error.pos :].lstrip()
        found, remedy = f"invalid JSON ({error.msg})", "Mend the text there"
        if before.endswith(",") and rest[:1] in ("}", "]") or "trailing comma" in error.msg:
            found, remedy = "a comma before a closing bracket, which JSON does not allow,", "Remove that comma"
        elif not rest or error.msg.startswith("Unterminated string"):
            found, remedy = f"the text ends early ({error.msg})", "Download the file again, or close what is open"
        raise DataError(
            f"{path}: {name}: {found} at line {line}, column {column}; each record is one JSON object. {remedy}."
        ) from None


def _read(path: str | Path, start: int, length: int) -> bytes:
    with open(path, "rb") as handle:
        handle.seek(start)
        return handle.read(length)


def _line_spans(path: Path, begin: int) -> np.ndarray:
    """Give the span of every non-blank line."""
    spans = array("q")  # start, stop, start, stop, ...
    with open(path, "rb") as handle:
        handle.seek(begin)
        start = begin
        for line in handle:
            stripped = line.rstrip(_WHITESPACE)
            lead = len(stripped) - len(stripped.lstrip(_WHITESPACE))
            if stripped:
                spans.extend((start + lead, start + len(stripped)))
            start += len(line)
    first = _read(path, spans[0], spans[1] - spans[0])
    if len(spans) > 2 and not first.endswith(b"}"):
        raise DataError(
            f"{path}: line 1 opens an object that does not end on that line; JSON Lines has one whole record per line. "
            "Write one record per line, or put the records into an array: [ {...}, {...} ]."
        )
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _array_spans(path: Path, size: int) -> np.ndarray:
    """Give the span of every object in a top-level array, checking what lies between them."""
    starts, stops, close = _scan_array(path)
    if close is None:
        _explain_unclosed(path, starts, stops, size)
    with open(path, "rb") as handle:
        opening = _offset_of_bracket(handle)
        if len(starts) == 0 and not _between(handle, opening + 1, close).strip(_WHITESPACE):
            raise DataError(f"{path} holds an empty array; at least one record is needed. Check how it was made.")
        stops_before = np.concatenate([[opening + 1], stops])
        starts_after = np.concatenate([starts, [close]])
        for index, (stop, start) in enumerate(zip(stops_before.tolist(), starts_after.tolist(), strict=True)):
            is_inner = 0 < index < len(starts)
            gap = _between(handle, stop, start)
            if not (_SEPARATOR.fullmatch(gap) if is_inner else not gap.strip(_WHITESPACE)):
                _explain_gap(path, gap, stop, index, is_inner)
        for index, start in enumerate(starts.tolist()):
            if _between(handle, start, start + 1) != b"{":
                line, column = position_of(path, start)
                raise DataError(
                    f"{path}: element {index} at line {line}, column {column} is an array; every element must be an "
                    "object {...}. Unpack the inner array."
                )
        if _between(handle, close, close + 1) != b"]":
            line, column = position_of(path, close)
            raise DataError(
                f"{path}: '}}' closes the array at line {line}, column {column}; ']' is needed there. Mend it."
            )
        handle.seek(close + 1)
        if handle.read(CHUNK_BYTES).strip(_WHITESPACE):
            line, column = position_of(path, close + 1)
            raise DataError(
                f"{path}: more text follows the end of the array at line {line}, column {column}; one array is "
                "allowed. Join the arrays into one."
            )
    return np.stack([starts, stops], axis=1)


def _scan_array(path: Path) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Follow brackets outside strings: starts and stops of depth-1 elements, and where the array closes."""
    starts, stops = [], []
    base, depth, in_string, odd_backslashes = 0, 0, False, False
    with open(path, "rb") as handle:
        while data := handle.read(CHUNK_BYTES):
            chunk = np.frombuffer(data, dtype=np.uint8)
            quotes, odd_backslashes = _plain_quotes(chunk, odd_backslashes)
            opens = (chunk == ord("{")) | (chunk == ord("["))
            brackets = np.flatnonzero(opens | (chunk == ord("}")) | (chunk == ord("]")))
            is_outside = (np.searchsorted(quotes, brackets) + in_string) % 2 == 0
            in_string = bool((len(quotes) + in_string) % 2)
            brackets = brackets[is_outside]
            is_open = opens[brackets]
            depths = depth + np.cumsum(np.where(is_open, 1, -1))  # depth after each bracket
            closing = np.flatnonzero(depths == 0)
            last = closing[0] + 1 if len(closing) else len(brackets)
            brackets, is_open, depths = brackets[:last], is_open[:last], depths[:last]
            starts.append(base + brackets[is_open & (depths == 2)])
            stops.append(base + brackets[~is_open & (depths == 1)] + 1)
            if len(closing):
                return np.concatenate(starts), np.concatenate(stops), base + int(brackets[-1])
            depth = int(depths[-1]) if len(depths) else depth
            base += len(data)
    return np.concatenate(starts), np.concatenate(stops), None


def _plain_quotes(chunk: np.ndarray, odd_before: bool) -> tuple[np.ndarray, bool]:
    """Give the quotes that no backslash escapes.

    Args:
        chunk: Bytes, uint8.
        odd_before: Whether an odd run of backslashes ended the previous chunk.

    Returns:
        Offsets of those quotes, and whether an odd run of backslashes ends this chunk.
    """
    quotes = np.flatnonzero(chunk == ord('"'))
    backslashes = np.flatnonzero(chunk == ord("\\"))
    if len(backslashes) == 0:
        return (quotes[quotes > 0] if odd_before else quotes), False
    is_first = np.diff(backslashes, prepend=-2) != 1
    run_starts = backslashes[is_first]
    run_ends = backslashes[np.append(is_first[1:], True)] + 1
    is_odd = (run_ends - run_starts) % 2 == 1
    if odd_before and run_starts[0] == 0:
        is_odd[0] = ~is_odd[0]
    escaped = run_ends[is_odd]
    if odd_before and run_starts[0] != 0:
        escaped = np.append(escaped, 0)
    return np.setdiff1d(quotes, escaped, assume_unique=True), bool(is_odd[-1] and run_ends[-1] == len(chunk))


def _between(handle, start: int, stop: int) -> bytes:
    return os.pread(handle.fileno(), max(0, stop - start), start)


def _offset_of_bracket(handle) -> int:
    return handle.read(1 << 16).index(b"[")


def _explain_gap(path: Path, gap: bytes, start: int, index: int, is_inner: bool) -> None:
    """Raise the error for what lies between two records."""
    text = gap.strip(_WHITESPACE)
    line, column = position_of(path, start + len(gap) - len(gap.lstrip(_WHITESPACE)))
    where = f"at line {line}, column {column}"
    if not text:
        raise DataError(f"{path}: no comma {where} before element {index}; records are separated by one. Add a comma.")
    if not text.strip(b", \t\r\n"):
        side = "between two records" if is_inner else ("after the last one" if index else "before the first one")
        raise DataError(f"{path}: a stray comma {where}, {side}; single commas between records are allowed. Remove it.")
    shown = text.strip(b", \t\r\n")
    line, column = position_of(path, start + gap.index(shown))
    word = shown[:30].decode("utf-8", errors="replace")
    raise DataError(
        f"{path}: {word!r} at line {line}, column {column} (near element {index}) is not a record; every element must "
        "be an object {...}. Remove it, or look for an unbalanced quote or bracket before it."
    )


def _explain_unclosed(path: Path, starts: np.ndarray, stops: np.ndarray, size: int) -> None:
    """Raise the error for a file whose array never closes, at the first text that does not parse."""
    for index, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=False)):
        parse_json(path, start, _read(path, start, stop - start), f"record {index}")
    if len(starts) > len(stops):
        start = int(starts[len(stops)])
        parse_json(path, start, _read(path, start, size - start), f"record {len(stops)}")
    line, column = position_of(path, size)
    raise DataError(
        f"{path}: the array is not closed at the end of the file (line {line}, column {column}); ']' is needed there. "
        "Download the file again, or add the bracket."
    )
