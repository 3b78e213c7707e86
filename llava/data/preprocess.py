"""Encoding of a conversation: token ids, labels and turn ids, marked by character offsets.

The conversation is rendered once and tokenized once, exactly as evaluation tokenizes a prompt; each token then looks
up, by the characters it covers, whether it is learned and which turn it belongs to. Nothing is tokenized twice and
compared, so no "tokenization mismatch" can occur.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Conversation
from llava.data.records import DataError, Record, Turn

BYTES_PER_TOKEN = 4
"""About what a token of English takes."""

_TOKENS_WITHOUT_TEXT = 4  # most that a tokenizer adds to a piece of text around images: begin, end, a leading space
_IMAGE_KEY = re.compile(rb'"image"\s*:\s*["\[]')  # in a text the quotes would be escaped, so that it cannot match
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_PIECE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes for a space


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of one conversation with what training needs to know of each."""

    input_ids: list[int]  # token ids after image expansion, N
    labels: list[int]  # token ids where learned, ``IGNORE_INDEX`` elsewhere, N
    # 0 up to and including the first question's last image token (the system prompt where there is no image) and at
    # every other image token, else the number of the turn, N
    turn_ids: list[int]
    is_truncated: bool = False  # whether turns or tokens were cut to fit the maximum length

    @property
    def num_trained(self) -> int:
        """Number of learned tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def encode_conversation(
    turns: Sequence[Turn],
    tokenizer: Any,
    template: Conversation,
    num_image_tokens: int,
    image_token_id: int,
    max_length: int | None = None,
) -> EncodedConversation:
    """Render, tokenize and mark one conversation.

    Args:
        turns: Questions with their answers; ``<image>`` marks images in questions. A single marker goes first.
        tokenizer: Fast or slow tokenizer.
        template: Empty conversation of the wanted template.
        num_image_tokens: Positions one image takes.
        image_token_id: Token id that marks an image position.
        max_length: Longest result in tokens, after image expansion. What does not fit is cut from the end; an image
            is never cut in half.

    Raises:
        DataError: If an image does not fit ``max_length``.
        ValueError: If a slow tokenizer rewrites its text.
    """
    conversation = template.copy()
    for turn in turns:
        question = _marker_first(turn.question).replace(DEFAULT_IMAGE_TOKEN, template.image_markup)
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], turn.answer)
    whole = _encode(conversation, tokenizer, num_image_tokens, image_token_id)
    if max_length is None or len(whole.input_ids) <= max_length:
        return whole
    if image_token_id in whole.input_ids[max_length:]:
        last_image = len(whole.input_ids) - whole.input_ids[::-1].index(image_token_id)
        raise DataError(
            f"The image tokens end at position {last_image}, beyond model_max_length {max_length}; raise "
            "--model_max_length or drop the sample."
        )
    ids, labels, turn_ids = (part[:max_length] for part in (whole.input_ids, whole.labels, whole.turn_ids))
    return EncodedConversation(ids, labels, turn_ids, is_truncated=True)


def encode_prompt(
    conversation: Conversation, tokenizer: Any, num_image_tokens: int, image_token_id: int
) -> tuple[list[int], list[int]]:
    """Token ids and turn ids of a conversation whose last answer is open; a prefix of its training encoding."""
    encoded = _encode(conversation, tokenizer, num_image_tokens, image_token_id)
    return encoded.input_ids, encoded.turn_ids


def _encode(
    conversation: Conversation, tokenizer: Any, num_image_tokens: int, image_token_id: int
) -> EncodedConversation:
    """Encode a conversation, whole."""
    segments = list(conversation.segments())
    ends = list(accumulate(len(segment.text) for segment in segments))
    tokens = _tokenize_around_images("".join(segment.text for segment in segments), tokenizer)
    # A token belongs to the segment of its last character: a leading space belongs to what follows it.
    numbers = [bisect_right(ends, max(stop - 1, start, 0)) for _, start, stop in tokens]
    owners = [segments[min(number, len(segments) - 1)] for number in numbers]
    # Turn 0 ends with the last image of the first question.
    is_first = [token_id is None and owner.turn == 1 for (token_id, _, _), owner in zip(tokens, owners, strict=True)]
    prefix_end = max((n for n, is_image in enumerate(is_first) if is_image), default=-1)
    encoded = EncodedConversation([], [], [])
    for n, ((token_id, _, _), owner) in enumerate(zip(tokens, owners, strict=True)):
        is_image = token_id is None
        count = num_image_tokens if is_image else 1
        encoded.input_ids.extend([image_token_id if token_id is None else token_id] * count)
        encoded.labels.extend([token_id if owner.is_answer and token_id is not None else IGNORE_INDEX] * count)
        encoded.turn_ids.extend([0 if is_image or n <= prefix_end else owner.turn] * count)
    return encoded


def _marker_first(question: str) -> str:
    """Move the one image marker of a question to its front, where evaluation puts it (LLaVA's preprocess_multimodal).

    LLaVA's mixture writes many of them last. A question of several images keeps its order, which it may refer to.
    """
    if question.count(DEFAULT_IMAGE_TOKEN) != 1:
        return question
    text = question.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return f"{DEFAULT_IMAGE_TOKEN}\n{text}".strip()


# ---- tokens and the characters they cover ---------------------------------------------------------------------------


def _tokenize_around_images(text: str, tokenizer: Any) -> list[tuple[int | None, int, int]]:
    """Tokenize around ``<image>`` as ``tokenizer_image_token`` does: id (None for an image) and character range."""
    tokens: list[tuple[int | None, int, int]] = []
    start = 0
    for number, chunk in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        if number:
            tokens.append((None, start, start + len(DEFAULT_IMAGE_TOKEN)))
            start += len(DEFAULT_IMAGE_TOKEN)
        for position, (token_id, left, right) in enumerate(_tokenize_with_offsets(chunk, tokenizer)):
            is_bos = position == 0 and token_id == tokenizer.bos_token_id and left == right
            if not (number and is_bos):  # <s> is kept once, in front
                tokens.append((token_id, start + left, start + right))
        start += len(chunk)
    return tokens


def _tokenize_with_offsets(text: str, tokenizer: Any) -> list[tuple[int, int, int]]:
    """Id, start and end in characters of each token, special ones included, whose range is empty.

    A fast tokenizer tells the ranges itself. The pieces of a slow one are laid along the text, one after the other.
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
        surface, start, byte = piece.replace(_SPACE_PIECE, " "), position, _BYTE_PIECE.fullmatch(piece)
        if surface.startswith(" ") and not text.startswith(surface, start):
            # Its leading space is missing in the text, as the first word's is, or is another white space there.
            surface = surface.lstrip(" ")
            while surface and text[start : start + 1].isspace():
                start += 1
        if not pending and text.startswith(surface, start):
            spans.append((position, start + len(surface)))
            position = start + len(surface)
        elif byte:
            pending += bytes.fromhex(byte[1])
            spans.append((position, position + 1))
            if text[position : position + 1].encode() == pending:
                position, pending = position + 1, b""
        else:
            raise ValueError(
                f"Tokenizer {tokenizer_name} gives the piece {piece!r}, which is not in the text at "
                f"{text[position : position + 20]!r}; a slow tokenizer must not rewrite its text. Load a fast one."
            )
    return spans


# ---- lengths, and a view of what is learned --------------------------------------------------------------------------


def estimate_length(text: bytes, num_image_tokens: int) -> int:
    """Rough length of a record in tokens, negative without an image; a tenth of the time that parsing takes.

    Args:
        text: The record as it stands in its file.
        num_image_tokens: Positions one image takes.

    >>> estimate_length(b'{"image": "coco/1.jpg", "conversations": []}', 576)
    587
    """
    num_tokens = max(1, len(text) // BYTES_PER_TOKEN)
    if not _IMAGE_KEY.search(text):
        return -num_tokens
    return num_tokens + max(1, text.count(DEFAULT_IMAGE_TOKEN.encode())) * num_image_tokens


@dataclass(frozen=True)
class LengthMeter:
    """Measures records as training encodes them; needs a model's configuration and tokenizer, not its weights."""

    tokenizer: Any  # fast tokenizer of the model
    template: Conversation  # empty conversation of the template to train with
    num_image_tokens: int  # positions one image takes
    image_token_id: int  # token id of an image position
    max_length: int  # longest sample in tokens, images included

    def encode(self, record: Record, max_length: int | None = None) -> EncodedConversation:
        """Encode a record, whole or cut. Raises DataError if an image does not fit."""
        image = (self.num_image_tokens, self.image_token_id)
        return encode_conversation(record.turns, self.tokenizer, self.template, *image, max_length)

    def measure(self, record: Record) -> tuple[int, int]:
        """Tokens in all, and trained tokens within the maximum length. Raises DataError if an image does not fit."""
        whole = self.encode(record)
        total = len(whole.input_ids)
        return total, (whole if total <= self.max_length else self.encode(record, self.max_length)).num_trained

    def may_exceed(self, record: Record) -> bool:
        """Whether a record could be longer than the maximum, judged without tokenizing: a token is at least a byte."""
        frame = self.template.copy()  # what the template puts around one question and its answer
        frame.system = ""
        for role in (*frame.roles, *frame.roles):
            frame.append_message(role, "")
        texts = [self.template.system, *(frame.get_prompt() + turn.question + turn.answer for turn in record.turns)]
        num_images = len(record.images)
        num_without_text = (num_images + 1) * _TOKENS_WITHOUT_TEXT + num_images * self.num_image_tokens
        return sum(len(text.encode()) for text in texts) + num_without_text > self.max_length


def view_tokens(
    encoded: EncodedConversation, tokenizer: Any, image_token_id: int
) -> Iterator[tuple[str, int, int, str]]:
    """Show what is learned of a conversation, what is masked and where images are.

    Yields:
        For each run of tokens of one kind and turn: "trained", "masked" or "image", the turn (0 in front of the first
        question), the number of tokens, and their text with special tokens, empty for an image.
    """

    def describe(position: int) -> tuple[str, int]:
        kind = "masked" if encoded.labels[position] == IGNORE_INDEX else "trained"
        is_image = encoded.input_ids[position] == image_token_id
        return "image" if is_image else kind, encoded.turn_ids[position]

    for (kind, turn), positions in groupby(range(len(encoded.input_ids)), describe):
        ids = [encoded.input_ids[position] for position in positions]
        yield kind, turn, len(ids), "" if kind == "image" else tokenizer.decode(ids)
