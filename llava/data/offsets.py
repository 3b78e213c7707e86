"""Character ranges of tokens: which part of a text each token stands for, with any tokenizer."""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a blank."""

TokenRange = tuple[int, int, int]
"""Token id, start and end: the half-open range of characters; empty for a token without text, such as ``<s>``."""


def tokenize_with_offsets(text: str, tokenizer: Any) -> list[TokenRange]:
    """Tokenize a text, special tokens included, and say where each token stands.

    A fast tokenizer tells the ranges itself. The pieces of a slow one are laid along the text, one after the other.

    Args:
        text: Any text.
        tokenizer: Fast or slow tokenizer.

    Raises:
        ValueError: If a slow tokenizer rewrites the text, so that its pieces are not found there.
    """
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True)
        return [(i, *span) for i, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]
    ids, pieces = tokenizer(text).input_ids, tokenizer.tokenize(text)
    spans = _lay_along(text, pieces, type(tokenizer).__name__)
    starts_with_bos = bool(ids) and ids[0] == tokenizer.bos_token_id and pieces[:1] != [tokenizer.bos_token]
    front = int(starts_with_bos and len(ids) > len(pieces))
    back = len(ids) - len(pieces) - front
    spans = [(0, 0)] * front + spans + [(len(text), len(text))] * back
    return [(token_id, *span) for token_id, span in zip(ids, spans, strict=True)]


def _lay_along(text: str, pieces: list[str], tokenizer_name: str) -> list[tuple[int, int]]:
    """Ranges of pieces that follow one another in a text."""
    spans: list[tuple[int, int]] = []
    position, pending = 0, b""  # bytes of a character that is not complete yet
    for piece in pieces:
        end = _end_of(text, position, piece)
        byte = _BYTE.fullmatch(piece)
        if end is None and byte:
            pending += bytes.fromhex(byte[1])
            is_whole = text[position : position + 1].encode() == pending
            spans.append((position, position + 1))
            if is_whole:
                position, pending = position + 1, b""
            continue
        if end is None or pending:
            raise ValueError(
                f"Tokenizer {tokenizer_name} gives the piece {piece!r}, which is not in the text at "
                f"{text[position : position + 20]!r}; a slow tokenizer must not rewrite its text. Load a fast one."
            )
        spans.append((position, end))
        position = end
    return spans


def _end_of(text: str, position: int, piece: str) -> int | None:
    """Where a piece ends that begins at a position; None if it does not begin there.

    A piece may have a leading blank that the text has not (the first word's), or has as another white space.
    """
    surface = piece.replace(_BLANK, " ")
    if text.startswith(surface, position):
        return position + len(surface)
    word = surface.lstrip(" ")
    start = position
    if surface != word:
        while start < len(text) and word and text[start].isspace():
            start += 1
        return start + len(word) if text.startswith(word, start) else None
    return None
