"""From a conversation to token ids, labels and turn ids, marked by character offsets.

The conversation is rendered once and tokenized once, exactly as evaluation tokenizes a prompt; each token then looks
up, by the characters it covers, whether it is learned and which turn it belongs to. Nothing is tokenized twice and
compared, so no "tokenization mismatch" can occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Conversation
from llava.data.records import Turn


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of one conversation with what training needs to know of each.

    Attributes:
        input_ids: Token ids after image expansion, N.
        labels: Token ids where learned, ``IGNORE_INDEX`` elsewhere, N.
        turn_ids: 0 up to and including the first question's last image token (the system prompt where there is no
            image), then the number of the turn, N.
        is_truncated: Whether turns or tokens were cut to fit the maximum length.
    """

    input_ids: list[int]
    labels: list[int]
    turn_ids: list[int]
    is_truncated: bool = False

    @property
    def num_trained(self) -> int:
        """Number of learned tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class _Token:
    """A token with the half-open character range it covers in the rendered prompt; an image marker has ``id`` None."""

    id: int | None
    start: int
    end: int


def encode_conversation(
    turns: tuple[Turn, ...] | list[Turn],
    tokenizer: Any,
    template: Conversation,
    num_image_tokens: int,
    image_token_id: int,
    max_length: int | None = None,
) -> EncodedConversation:
    """Render, tokenize and mark one conversation.

    Args:
        turns: Questions with their answers; ``<image>`` marks images in questions.
        tokenizer: A fast tokenizer (it must give character offsets).
        template: Empty conversation of the wanted template.
        num_image_tokens: Positions one image takes.
        image_token_id: Token id that marks an image position.
        max_length: Longest result in tokens, after image expansion. What does not fit is cut from the end; an image
            is never cut in half.

    Returns:
        The encoded conversation.

    Raises:
        ValueError: If the tokenizer gives no offsets, or if an image does not fit ``max_length``.
    """
    conversation = template.copy()
    for turn in turns:
        conversation.append_message(conversation.roles[0], turn.question)
        conversation.append_message(conversation.roles[1], turn.answer)
    text, spans = _render(conversation)
    ids, labels, turn_ids = [], [], []
    tokens = _tokenize(text, tokenizer)
    last_image = max((i for i, token in enumerate(tokens) if token.id is None), default=-1)
    for index, token in enumerate(tokens):
        turn, is_answer = _lookup(spans, token)
        if token.id is None:
            ids += [image_token_id] * num_image_tokens
            labels += [IGNORE_INDEX] * num_image_tokens
            turn_ids += [0] * num_image_tokens
            continue
        in_prefix = turn == 1 and index < last_image and not is_answer
        ids.append(token.id)
        labels.append(token.id if is_answer else IGNORE_INDEX)
        turn_ids.append(0 if in_prefix else turn)
    return _truncate(ids, labels, turn_ids, image_token_id, max_length)


def encode_prompt(
    conversation: Conversation, tokenizer: Any, num_image_tokens: int, image_token_id: int
) -> tuple[list[int], list[int]]:
    """Token ids and turn ids of a conversation whose last answer is open; a prefix of its training encoding."""
    text, spans = _render(conversation)
    tokens = _tokenize(text, tokenizer)
    last_image = max((i for i, token in enumerate(tokens) if token.id is None), default=-1)
    ids, turn_ids = [], []
    for index, token in enumerate(tokens):
        turn, _ = _lookup(spans, token)
        count = num_image_tokens if token.id is None else 1
        ids += [image_token_id if token.id is None else token.id] * count
        turn_ids += [0 if token.id is None or (turn == 1 and index < last_image) else turn] * count
    return ids, turn_ids


def _render(conversation: Conversation) -> tuple[str, list[tuple[int, int, bool]]]:
    """The prompt and, per segment, (end, turn, is_answer)."""
    text, spans = "", []
    for segment in conversation.segments():
        text += segment.text
        spans.append((len(text), segment.turn, segment.is_answer))
    return text, spans


def _lookup(spans: list[tuple[int, int, bool]], token: _Token) -> tuple[int, bool]:
    """Turn and kind of the segment that holds a token's last character (a leading blank belongs to what follows)."""
    position = max(token.end - 1, token.start, 0)
    for end, turn, is_answer in spans:
        if position < end:
            return turn, is_answer
    return spans[-1][1], spans[-1][2]


def _tokenize(text: str, tokenizer: Any) -> list[_Token]:
    """Tokenize chunk-wise around ``<image>``, as ``tokenizer_image_token`` does, keeping character ranges."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"Tokenizer {type(tokenizer).__name__} gives no character offsets; load a fast tokenizer (use_fast=True)."
        )
    tokens: list[_Token] = []
    start = 0
    for number, chunk in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        if number:
            tokens.append(_Token(None, start, start + len(DEFAULT_IMAGE_TOKEN)))
            start += len(DEFAULT_IMAGE_TOKEN)
        encoded = tokenizer(chunk, return_offsets_mapping=True)
        for position, (token_id, (left, right)) in enumerate(
            zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ):
            is_bos = position == 0 and token_id == tokenizer.bos_token_id and left == right
            if number and is_bos:
                continue
            tokens.append(_Token(token_id, start + left, start + right))
        start += len(chunk)
    return tokens


def _truncate(
    ids: list[int], labels: list[int], turn_ids: list[int], image_token_id: int, max_length: int | None
) -> EncodedConversation:
    if max_length is None or len(ids) <= max_length:
        return EncodedConversation(ids, labels, turn_ids)
    if image_token_id in ids[max_length:]:
        last_image = len(ids) - ids[::-1].index(image_token_id)
        raise ValueError(
            f"The image tokens end at position {last_image}, beyond model_max_length {max_length}; raise "
            "--model_max_length or drop the sample."
        )
    return EncodedConversation(ids[:max_length], labels[:max_length], turn_ids[:max_length], is_truncated=True)
