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
from llava.data.offsets import tokenize_with_offsets
from llava.data.records import DataError, Turn


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of one conversation with what training needs to know of each.

    Attributes:
        input_ids: Token ids after image expansion, N.
        labels: Token ids where learned, ``IGNORE_INDEX`` elsewhere, N.
        turn_ids: 0 up to and including the first question's last image token (the system prompt where there is no
            image) and at every other image token, else the number of the turn, N.
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
        turns: Questions with their answers; ``<image>`` marks images in questions. A single marker goes first.
        tokenizer: Fast or slow tokenizer.
        template: Empty conversation of the wanted template.
        num_image_tokens: Positions one image takes.
        image_token_id: Token id that marks an image position.
        max_length: Longest result in tokens, after image expansion. What does not fit is cut from the end; an image
            is never cut in half.

    Returns:
        The encoded conversation.

    Raises:
        DataError: If an image does not fit ``max_length``.
        ValueError: If a slow tokenizer rewrites its text.
    """
    conversation = template.copy()
    for turn in turns:
        question = _marker_first(turn.question).replace(DEFAULT_IMAGE_TOKEN, template.image_markup)
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], turn.answer)
    ids, labels, turn_ids = [], [], []
    for token_id, turn, is_answer in _marked_tokens(conversation, tokenizer):
        count = num_image_tokens if token_id is None else 1
        ids += [image_token_id if token_id is None else token_id] * count
        labels += [token_id if is_answer else IGNORE_INDEX] * count
        turn_ids += [turn] * count
    return _truncate(ids, labels, turn_ids, image_token_id, max_length)


def encode_prompt(
    conversation: Conversation, tokenizer: Any, num_image_tokens: int, image_token_id: int
) -> tuple[list[int], list[int]]:
    """Token ids and turn ids of a conversation whose last answer is open; a prefix of its training encoding."""
    ids, turn_ids = [], []
    for token_id, turn, _ in _marked_tokens(conversation, tokenizer):
        count = num_image_tokens if token_id is None else 1
        ids += [image_token_id if token_id is None else token_id] * count
        turn_ids += [turn] * count
    return ids, turn_ids


def _marker_first(question: str) -> str:
    """Move the one image marker of a question to its front, where evaluation puts it (LLaVA's preprocess_multimodal).

    LLaVA's mixture writes many of them last. A question of several images keeps its order, which it may refer to.
    """
    if question.count(DEFAULT_IMAGE_TOKEN) != 1:
        return question
    text = question.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return f"{DEFAULT_IMAGE_TOKEN}\n{text}".strip()


def _marked_tokens(conversation: Conversation, tokenizer: Any) -> list[tuple[int | None, int, bool]]:
    """Token id (None for an image), turn and whether it is learned, for every token of a conversation."""
    text, spans = _render(conversation)
    tokens = _tokenize(text, tokenizer)
    places = [_lookup(spans, token) for token in tokens]
    first_images = (i for i, token in enumerate(tokens) if token.id is None and places[i][0] == 1)
    prefix_end = max(first_images, default=-1)
    return [
        (token.id, 0 if token.id is None or index <= prefix_end else turn, is_answer and token.id is not None)
        for index, (token, (turn, is_answer)) in enumerate(zip(tokens, places, strict=True))
    ]


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
    tokens: list[_Token] = []
    start = 0
    for number, chunk in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        if number:
            tokens.append(_Token(None, start, start + len(DEFAULT_IMAGE_TOKEN)))
            start += len(DEFAULT_IMAGE_TOKEN)
        for position, (token_id, left, right) in enumerate(tokenize_with_offsets(chunk, tokenizer)):
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
        raise DataError(
            f"The image tokens end at position {last_image}, beyond model_max_length {max_length}; raise "
            "--model_max_length or drop the sample."
        )
    return EncodedConversation(ids[:max_length], labels[:max_length], turn_ids[:max_length], is_truncated=True)
