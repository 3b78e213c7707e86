"""A view of one encoded conversation: which of its text is learned, which is masked, where images are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from llava.constants import IGNORE_INDEX
from llava.data.preprocess import EncodedConversation


@dataclass(frozen=True)
class TokenRun:
    """Neighbouring tokens of one kind and turn.

    Attributes:
        kind: ``"trained"``, ``"masked"`` or ``"image"``.
        turn: Turn, 0 for what stands before the first question.
        num_tokens: Number of tokens.
        text: Their text, special tokens included; empty for an image.
    """

    kind: str
    turn: int
    num_tokens: int
    text: str


def view_tokens(encoded: EncodedConversation, tokenizer: Any, image_token_id: int) -> list[TokenRun]:
    """Split a conversation where the kind or the turn changes.

    Args:
        encoded: The conversation as training sees it.
        tokenizer: The tokenizer that encoded it.
        image_token_id: Token id of image positions.
    """

    def describe(position: int) -> tuple[str, int]:
        if encoded.input_ids[position] == image_token_id:
            return "image", encoded.turn_ids[position]
        kind = "masked" if encoded.labels[position] == IGNORE_INDEX else "trained"
        return kind, encoded.turn_ids[position]

    runs = []
    for (kind, turn), positions in groupby(range(len(encoded.input_ids)), describe):
        ids = [encoded.input_ids[position] for position in positions]
        runs.append(TokenRun(kind, turn, len(ids), "" if kind == "image" else tokenizer.decode(ids)))
    return runs
