"""How long records are for a model: tokens after image expansion, and whether an answer is left within the maximum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava.conversation import Conversation
from llava.data.preprocess import EncodedConversation, encode_conversation
from llava.data.records import Record

_TOKENS_WITHOUT_TEXT = 4
"""Most tokens that a tokenizer adds to each piece of text around images: begin, end, a leading blank."""


@dataclass(frozen=True)
class LengthMeter:
    """Measures records as training encodes them; needs a model's configuration and tokenizer, not its weights.

    Attributes:
        tokenizer: Fast tokenizer of the model.
        template: Empty conversation of the template to train with.
        num_image_tokens: Positions one image takes.
        image_token_id: Token id of an image position.
        max_length: Longest sample in tokens, images included.
    """

    tokenizer: Any
    template: Conversation
    num_image_tokens: int
    image_token_id: int
    max_length: int

    def encode(self, record: Record, max_length: int | None = None) -> EncodedConversation:
        """Encode a record, whole or cut. Raises DataError if an image does not fit."""
        image = (self.num_image_tokens, self.image_token_id)
        return encode_conversation(record.turns, self.tokenizer, self.template, *image, max_length)

    def measure(self, record: Record) -> tuple[int, int]:
        """Give tokens in all, and trained tokens within the maximum length.

        Raises:
            DataError: If an image does not fit the maximum length.
        """
        whole = self.encode(record)
        total = len(whole.input_ids)
        return total, (whole if total <= self.max_length else self.encode(record, self.max_length)).num_trained

    def may_exceed(self, record: Record) -> bool:
        """Whether a record could be longer than the maximum, judged without tokenizing: a token is at least a byte."""
        num_bytes = sum(len(turn.question.encode()) + len(turn.answer.encode()) for turn in record.turns)
        pieces = len(record.images) + 1
        markup = len(self.template.system.encode()) + len(record.turns) * self._markup_of_a_turn()
        text = num_bytes + markup + pieces * _TOKENS_WITHOUT_TEXT
        return text + len(record.images) * self.num_image_tokens > self.max_length

    def _markup_of_a_turn(self) -> int:
        """Bytes that the template puts around one question and its answer."""
        conversation = self.template.copy()
        conversation.system = ""
        for role in (*conversation.roles, *conversation.roles):
            conversation.append_message(role, "")
        return len(conversation.get_prompt().encode())
