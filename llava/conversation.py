"""Conversation templates: how a list of messages becomes one prompt string.

A template is an entry of ``conv_templates``; its name is what users pass to ``--version`` and lmms-eval to
``conv_template``. The formats are those published with Vicuna, Llama 2, MPT, Mistral and LLaVA; each renders character
for character as LLaVA-1.5 renders it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN


class SeparatorStyle(Enum):
    """How messages are joined."""

    SINGLE = auto()  # "<role>: <message><sep>"
    TWO = auto()  # as SINGLE, with sep after questions and sep2 after answers
    MPT = auto()  # "<role><message><sep>", roles carry their own markup
    PLAIN = auto()  # "<image><caption><sep>", without the words that ask for the caption; aligns a projector
    LLAMA_2 = auto()  # "[INST] <question> [/INST] <answer>"


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered prompt."""

    text: str  # the characters
    turn: int  # 0 for the system prompt and examples, then 1 for the first question with its answer, and so on
    is_answer: bool  # whether training learns these characters


@dataclass
class Conversation:
    """Messages with the template that renders them (LLaVA's class of the same name)."""

    system: str  # system prompt, may be empty
    roles: tuple[str, str]  # names of the user and of the assistant
    # ``[role, text or None]``; None or an empty text asks the model to continue. A text may be a tuple whose first
    # item is the text: LLaVA's form for a message with an attached image, which then leads the first message.
    messages: list = field(default_factory=list)
    offset: int = 0  # leading messages that are examples, part of the prompt and never learned
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"  # after questions; after every message where the style knows one separator only
    sep2: str | None = None  # after answers
    version: str = "Unknown"  # family of the template
    skip_next: bool = False  # LLaVA's mark of a conversation that its web server need not answer; unused here
    image_markup: str = DEFAULT_IMAGE_TOKEN  # what training writes for ``<image>``

    def append_message(self, role: str, message: str | tuple | None) -> None:
        """Add one message; ``None`` leaves the place of the answer open."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent copy, so that the template itself stays as it is."""
        return replace(self, messages=[list(message) for message in self.messages])

    def dict(self) -> dict[str, Any]:
        """The conversation as LLaVA's servers and logs hold it; of a message with an image, the text."""
        messages = [[role, _text_of(message)] for role, message in self.messages]
        names = ("system", "roles", "offset", "sep", "sep2")
        return {"messages": messages, **{name: getattr(self, name) for name in names}}

    def get_prompt(self) -> str:
        """The whole conversation as one string."""
        return "".join(segment.text for segment in self.segments())

    def segments(self) -> Iterator[Segment]:
        """Yield the prompt in pieces that know their turn, and whether they are learned.

        An answer's piece begins with the space before it, which some tokenizers make a token of its own, and ends with
        the separator behind it; the model learns both. What leads up to it ("ASSISTANT:") belongs to the question, so
        an open prompt ends exactly where the answer's piece begins.
        """
        if self.sep_style not in (SeparatorStyle.PLAIN, SeparatorStyle.LLAMA_2) and self.system:
            yield Segment(self.system + self.sep, 0, False)
        messages, num_examples = self._messages_as_text()
        for index, (role, text) in enumerate(messages):
            turn, is_answer = max(0, (index - num_examples) // 2 + 1), index % 2 == 1
            before, after = self._surroundings(role, text, is_answer, is_first=index == 0)
            if not is_answer:
                # A caption is learned without the words that ask for it.
                if self.sep_style is SeparatorStyle.PLAIN and DEFAULT_IMAGE_TOKEN in text:
                    text = DEFAULT_IMAGE_TOKEN * text.count(DEFAULT_IMAGE_TOKEN)
                yield Segment(before + text + after, turn, False)
                continue
            if before:
                yield Segment(before, turn, False)
            if text:
                space = "" if self.sep_style in (SeparatorStyle.PLAIN, SeparatorStyle.MPT) else " "
                yield Segment(space + text + after, turn, turn > 0)

    def _messages_as_text(self) -> tuple[list[tuple[str, str]], int]:
        """Roles with texts, and how many of them are examples; an image attached to the first message leads it."""
        messages = [(role, _text_of(message) or "") for role, message in self.messages]
        if not messages or not isinstance(self.messages[0][1], tuple):
            return messages, self.offset
        role, text = messages[0]
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if self.image_markup == DEFAULT_IMAGE_TOKEN:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *messages[1:]], self.offset
        shown = [(self.roles[0], self.image_markup), (self.roles[1], "Received.")]
        return [*shown, (role, text), *messages[1:]], self.offset + len(shown)

    def _surroundings(self, role: str, text: str, is_answer: bool, is_first: bool) -> tuple[str, str]:
        """What stands before and after a message's own text."""
        end = (self.sep2 or self.sep) if is_answer else self.sep
        if self.sep_style is SeparatorStyle.PLAIN:
            return "", end if is_answer else ""
        if self.sep_style is SeparatorStyle.MPT:
            return role, self.sep if text else ""
        if self.sep_style is SeparatorStyle.LLAMA_2:
            if is_answer:
                return "", f" {self.sep2 or ''}"
            system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if is_first and self.system else ""
            return f"{'' if is_first else self.sep}[INST] {system}", " [/INST]"
        if not text:
            return f"{role}:", ""
        lead = f"{role}:" if is_answer else f"{role}: "
        return lead, end if self.sep_style is SeparatorStyle.TWO else self.sep


def _text_of(message: str | tuple | None) -> str | None:
    return message[0] if isinstance(message, tuple) else message


_CHAT = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_HUMAN_SYSTEM, _USER_SYSTEM = _CHAT.format("human"), _CHAT.format("user")
_TAGGED_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_MPT_TEXT_SYSTEM = (
    "- You are a helpful assistant chatbot trained by MosaicML.\n"
    "- You answer questions.\n"
    "- You are excited to be able to help the user, but will refuse to do anything that could be considered harmful to "
    "the user.\n"
    "- You are more than just an information source, you are also able to write poetry, short stories, and make jokes."
)
_LLAVA_MPT_SYSTEM = (
    "- You are a helpful language and vision assistant.\n"
    "- You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language.\n"
    "- You should follow the instructions carefully and explain your answers in detail."
)
_VICUNA_V0_EXAMPLE = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n"
)
_ROLES = ("USER", "ASSISTANT")
_IMAGE_TAGS = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"


_v0 = partial(Conversation, roles=("Human", "Assistant"))
_vicuna = partial(Conversation, roles=_ROLES, version="v1", sep_style=SeparatorStyle.TWO, sep=" ", sep2="</s>")
_llama_2 = partial(
    Conversation, roles=_ROLES, version="llama_v2", sep_style=SeparatorStyle.LLAMA_2, sep="<s>", sep2="</s>"
)


def _chatml(system: str) -> Conversation:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    system = f"<|im_start|>system\n{system}"
    return Conversation(system, roles, version="mpt", sep_style=SeparatorStyle.MPT, sep="<|im_end|>")


conv_plain = Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n", version="plain")
conv_vicuna_v0 = _v0(
    _HUMAN_SYSTEM,
    messages=[
        ["Human", "What are the key differences between renewable and non-renewable energy sources?"],
        ["Assistant", _VICUNA_V0_EXAMPLE],
    ],
    offset=2,
)
conv_vicuna_v1 = _vicuna(_USER_SYSTEM)
conv_chatml_direct = _chatml("Answer the questions.")


class _Templates(dict[str, Conversation]):
    """Templates by name."""

    def __missing__(self, name: str) -> Conversation:
        raise KeyError(f"Conversation template '{name}' is unknown; use one of {', '.join(sorted(self))}.")


default_conversation = conv_vicuna_v1
conv_templates = _Templates(
    default=conv_vicuna_v0,
    v0=conv_vicuna_v0,
    v1=conv_vicuna_v1,
    vicuna_v1=conv_vicuna_v1,
    llama_2=_llama_2(_LLAMA_2_SYSTEM),
    mistral_instruct=_llama_2("", sep=""),
    chatml_direct=conv_chatml_direct,
    mistral_direct=conv_chatml_direct,
    plain=conv_plain,
    v0_plain=conv_plain,
    llava_v0=_v0(_HUMAN_SYSTEM),
    v0_mmtag=_v0(_TAGGED_SYSTEM, version="v0_mmtag", image_markup=_IMAGE_TAGS),
    llava_v1=_vicuna(_HUMAN_SYSTEM),
    v1_mmtag=_vicuna(_TAGGED_SYSTEM, version="v1_mmtag", image_markup=_IMAGE_TAGS),
    llava_llama_2=_llama_2(_LLAVA_LLAMA_2_SYSTEM),
    mpt=_chatml(_MPT_SYSTEM),
    mpt_text=_chatml(_MPT_TEXT_SYSTEM),
    llava_mpt=_chatml(_LLAVA_MPT_SYSTEM),
    digits=_vicuna(""),
)


def get_template(name: str) -> Conversation:
    """The empty conversation of a template.

    Raises:
        KeyError: If no template has this name; the message lists the known ones.

    >>> conversation = get_template("v1")
    >>> conversation.append_message(conversation.roles[0], "Which digit?")
    >>> conversation.append_message(conversation.roles[1], None)  # the answer is still to come
    >>> conversation.get_prompt()[-30:]
    ' USER: Which digit? ASSISTANT:'
    """
    return conv_templates[name].copy()
