"""Conversation templates: how a list of messages becomes one prompt string.

A template is an entry of ``conv_templates``; its name is what users pass to ``--version`` and lmms-eval to
``conv_template``. The formats are those published with Vicuna, Llama 2, MPT, Mistral and LLaVA-1.5.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto


class SeparatorStyle(Enum):
    """How messages are joined."""

    SINGLE = auto()  # "<role>: <message><sep>"
    TWO = auto()  # as SINGLE, with sep after questions and sep2 after answers
    MPT = auto()  # "<role><message><sep>", roles carry their own markup
    PLAIN = auto()  # messages only, used to align a projector
    LLAMA_2 = auto()  # "[INST] <question> [/INST] <answer>"


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered prompt.

    Attributes:
        text: The characters.
        turn: 0 for the system prompt, then 1 for the first question with its answer, and so on.
        is_answer: Whether training learns these characters.
    """

    text: str
    turn: int
    is_answer: bool


@dataclass
class Conversation:
    """Messages with the template that renders them (LLaVA's class of the same name).

    Attributes:
        system: System prompt, may be empty.
        roles: Names of the person and of the assistant.
        messages: ``[role, text or None]`` pairs; ``None`` asks the model to continue. A text may be a tuple whose
            first item is the text (LLaVA's form for a message with an attached image).
        sep_style: How messages are joined.
        sep: Separator after questions (after every message where the style knows one separator only).
        sep2: Separator after answers.
        version: Family of the template.
    """

    system: str
    roles: tuple[str, str]
    messages: list = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"

    def append_message(self, role: str, message: str | None) -> None:
        """Add one message; ``None`` leaves the place of the answer open."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent copy, so that the template itself stays empty."""
        return copy.deepcopy(self)

    def get_prompt(self) -> str:
        """The whole conversation as one string."""
        return "".join(segment.text for segment in self.segments())

    def segments(self) -> Iterator[Segment]:
        """Yield the prompt in pieces that know their turn, and whether they are learned.

        An answer's piece begins with the blank before it, which some tokenizers make a token of its own, and ends with
        the separator behind it; the model learns both. What leads up to it ("ASSISTANT:") belongs to the question, so
        an open prompt ends exactly where the answer's piece begins.
        """
        if self.sep_style is SeparatorStyle.LLAMA_2:
            yield from self._llama_2_segments()
            return
        system = self._system_text()
        if system:
            yield Segment(system, 0, False)
        for index, (role, message) in enumerate(self.messages):
            turn, is_answer = index // 2 + 1, index % 2 == 1
            prefix, text, separator = self._message_parts(role, _text_of(message), is_answer)
            if not is_answer:
                yield Segment(prefix + (text or "") + separator, turn, False)
                continue
            if prefix:
                yield Segment(prefix, turn, False)
            if text is not None:
                yield Segment(text + separator, turn, True)

    def _system_text(self) -> str:
        if self.sep_style is SeparatorStyle.PLAIN:
            return ""
        separator = self.sep
        return self.system + separator if self.system else ""

    def _message_parts(self, role: str, text: str | None, is_answer: bool) -> tuple[str, str | None, str]:
        """Split one message into what precedes it, its text and the separator behind it."""
        if self.sep_style is SeparatorStyle.PLAIN:
            return "", text, (self.sep2 or self.sep) if is_answer else self.sep
        if self.sep_style is SeparatorStyle.MPT:
            return role, text, self.sep if text is not None else ""
        if text is None:
            return f"{role}:", None, ""
        ends_turn = is_answer and self.sep_style is SeparatorStyle.TWO
        return f"{role}:", f" {text}", (self.sep2 or self.sep) if ends_turn else self.sep

    def _llama_2_segments(self) -> Iterator[Segment]:
        """Llama 2: the system prompt sits inside the first instruction, a new turn opens with the separator."""
        for index, (_, message) in enumerate(self.messages):
            turn, text = index // 2 + 1, _text_of(message)
            if index % 2 == 0:
                head = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if index == 0 and self.system else ""
                opening = self.sep if index else ""
                yield Segment(f"{opening}[INST] {head}{text or ''} [/INST]", turn, False)
            elif text is not None:
                yield Segment(f" {text} {self.sep2 or ''}", turn, True)


def _text_of(message: str | tuple | None) -> str | None:
    return message[0] if isinstance(message, tuple) else message


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

conv_plain = Conversation(system="", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="", sep2="\n", version="plain")
conv_vicuna_v1 = Conversation(
    system=_VICUNA_SYSTEM,
    roles=("USER", "ASSISTANT"),
    sep_style=SeparatorStyle.TWO,
    sep=" ",
    sep2="</s>",
    version="v1",
)
conv_digits = Conversation(
    system="", roles=("USER", "ASSISTANT"), sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>", version="v1"
)
conv_llama_2 = Conversation(
    system="You are a helpful language and vision assistant.",
    roles=("USER", "ASSISTANT"),
    sep_style=SeparatorStyle.LLAMA_2,
    sep="<s>",
    sep2="</s>",
    version="llama_v2",
)

default_conversation = conv_vicuna_v1
conv_templates: dict[str, Conversation] = {
    "plain": conv_plain,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llava_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "digits": conv_digits,
}


def get_template(name: str) -> Conversation:
    """The empty conversation of a template.

    Raises:
        KeyError: If no template has this name; the message lists the known ones.
    """
    if name not in conv_templates:
        raise KeyError(f"Conversation template '{name}' is unknown; use one of {', '.join(sorted(conv_templates))}.")
    return conv_templates[name].copy()
