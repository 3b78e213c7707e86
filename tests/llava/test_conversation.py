"""Promises of conversation templates: prompt strings, letter by letter, and the pieces they are made of."""

from __future__ import annotations

import pytest

from llava.conversation import Conversation, SeparatorStyle, conv_templates, get_template

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA = conv_templates["llama_2"].system
QUESTIONS, ANSWERS = ("<image>\nq1", "q2", "q3"), ("a1", "a2", "a3")

PROMPTS = {
    "v1": (
        f"{VICUNA} USER: <image>\nq1 ASSISTANT: a1</s>",
        f"{VICUNA} USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
        f"{VICUNA} USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>USER: q3 ASSISTANT: a3</s>",
    ),
    "plain": ("<image>\nq1a1\n", "<image>\nq1a1\nq2a2\n", "<image>\nq1a1\nq2a2\nq3a3\n"),
    "llama_2": (
        f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nq1 [/INST] a1 </s>",
        f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>",
        f"[INST] <<SYS>>\n{LLAMA}\n<</SYS>>\n\n<image>\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>"
        "<s>[INST] q3 [/INST] a3 </s>",
    ),
    "digits": (
        "USER: <image>\nq1 ASSISTANT: a1</s>",
        "USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
        "USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>USER: q3 ASSISTANT: a3</s>",
    ),
}


def converse(name: str, num_turns: int, is_open: bool = False) -> Conversation:
    conversation = get_template(name)
    for turn in range(num_turns):
        conversation.append_message(conversation.roles[0], QUESTIONS[turn])
        conversation.append_message(conversation.roles[1], ANSWERS[turn])
    if is_open:
        conversation.messages[-1][1] = None
    return conversation


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_a_conversation_renders_as_published(name: str, num_turns: int) -> None:
    assert converse(name, num_turns).get_prompt() == PROMPTS[name][num_turns - 1]


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_an_open_prompt_ends_where_the_answer_begins(name: str, num_turns: int) -> None:
    end = {"v1": " a{}</s>", "digits": " a{}</s>", "llama_2": " a{} </s>", "plain": "a{}\n"}[name].format(num_turns)
    prompt = converse(name, num_turns, is_open=True).get_prompt()
    assert prompt + end == PROMPTS[name][num_turns - 1]


@pytest.mark.parametrize("name", PROMPTS)
def test_pieces_know_their_turn_and_whether_they_are_learned(name: str) -> None:
    pieces = list(converse(name, 3).segments())
    assert "".join(piece.text for piece in pieces) == PROMPTS[name][2]
    learned = [(piece.turn, piece.text) for piece in pieces if piece.is_answer]
    end = {"plain": "\n", "llama_2": " </s>"}.get(name, "</s>")
    start = "" if name == "plain" else " "
    assert learned == [(turn, f"{start}a{turn}{end}") for turn in (1, 2, 3)]
    for turn in (1, 2, 3):
        question = "".join(piece.text for piece in pieces if piece.turn == turn and not piece.is_answer)
        assert QUESTIONS[turn - 1] in question and "a" + str(turn) not in question


def test_the_system_prompt_is_turn_zero() -> None:
    first = next(converse("v1", 1).segments())
    assert (first.text, first.turn, first.is_answer) == (VICUNA + " ", 0, False)
    assert next(converse("digits", 1).segments()).turn == 1


def test_styles_without_a_template_of_their_own_render_as_published() -> None:
    single = Conversation("S.", ("Human", "Assistant"), sep_style=SeparatorStyle.SINGLE, sep="###")
    mpt = Conversation("S.", ("<user>\n", "<bot>\n"), sep_style=SeparatorStyle.MPT, sep="<end>")
    for conversation in (single, mpt):
        for role, text in zip(conversation.roles * 2, ("q", "a", "r", None), strict=True):
            conversation.append_message(role, text)
    assert single.get_prompt() == "S.###Human: q###Assistant: a###Human: r###Assistant:"
    assert mpt.get_prompt() == "S.<end><user>\nq<end><bot>\na<end><user>\nr<end><bot>\n"


def test_a_message_with_an_attached_image_is_its_text() -> None:
    conversation = get_template("digits")
    conversation.append_message("USER", ("<image>\nq", object(), "Pad"))
    conversation.append_message("ASSISTANT", None)
    assert conversation.get_prompt() == "USER: <image>\nq ASSISTANT:"


@pytest.mark.parametrize("name", conv_templates)
def test_a_template_stays_empty_when_its_copy_is_used(name: str) -> None:
    conversation = get_template(name)
    conversation.append_message("USER", "q")
    assert conv_templates[name].messages == [] and get_template(name).messages == []


def test_an_unknown_template_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="template 'v9' is unknown; use one of digits, llama_2"):
        get_template("v9")
