"""Promises of conversation templates: prompt strings, letter by letter, and the pieces they are made of."""

from __future__ import annotations

import copy

import pytest

from llava.conversation import Conversation, SeparatorStyle, conv_templates, default_conversation, get_template
from published_prompts import EXAMPLE, HUMAN, MISTRAL, PUBLISHED, TAGGED, USER

QUESTIONS, ANSWERS = ("<image>\nq1", "q2", "q3"), ("a1", "a2", "a3")

# What the model learns of answer 1, by style: the blank before it, the separator behind it.
LEARNED = {
    SeparatorStyle.SINGLE: " a1###",
    SeparatorStyle.TWO: " a1</s>",
    SeparatorStyle.MPT: "a1<|im_end|>",
    SeparatorStyle.LLAMA_2: " a1 </s>",
    SeparatorStyle.PLAIN: "a1\n",
}


def converse(name: str, num_turns: int, is_open: bool = False) -> Conversation:
    """A conversation of the template, whose last answer may be left open."""
    conversation = get_template(name)
    for turn in range(num_turns):
        conversation.append_message(conversation.roles[0], QUESTIONS[turn])
        conversation.append_message(conversation.roles[1], ANSWERS[turn])
    if is_open:
        conversation.messages[-1][1] = None
    return conversation


def test_every_template_has_its_published_prompts() -> None:
    assert set(PUBLISHED) == set(conv_templates)


@pytest.mark.parametrize("name", conv_templates)
@pytest.mark.parametrize(("num_turns", "is_open"), [(1, False), (2, False), (2, True)])
def test_a_conversation_renders_as_published(name: str, num_turns: int, is_open: bool) -> None:
    lead, prompts = PUBLISHED[name]
    assert converse(name, num_turns, is_open).get_prompt() == lead + prompts[num_turns - 1 + is_open]


@pytest.mark.parametrize("name", conv_templates)
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_an_open_prompt_ends_where_the_answer_begins(name: str, num_turns: int) -> None:
    learned = LEARNED[get_template(name).sep_style].replace("1", str(num_turns))
    prompt = converse(name, num_turns, is_open=True).get_prompt()
    assert prompt + learned == converse(name, num_turns).get_prompt()


@pytest.mark.parametrize("name", conv_templates)
def test_pieces_know_their_turn_and_whether_they_are_learned(name: str) -> None:
    conversation = converse(name, 3)
    pieces = list(conversation.segments())
    assert "".join(piece.text for piece in pieces) == conversation.get_prompt()
    learned = [(piece.turn, piece.text) for piece in pieces if piece.is_answer]
    answer = LEARNED[conversation.sep_style]
    assert learned == [(turn, answer.replace("1", str(turn))) for turn in (1, 2, 3)]
    first = "<image>" if conversation.sep_style is SeparatorStyle.PLAIN else "q1"
    for turn, shown in ((1, first), (2, "q2"), (3, "q3")):
        question = "".join(piece.text for piece in pieces if piece.turn == turn and not piece.is_answer)
        assert shown in question and ANSWERS[turn - 1] not in question


def test_system_prompt_and_examples_are_turn_zero_and_not_learned() -> None:
    first = next(converse("v1", 1).segments())
    assert (first.text, first.turn, first.is_answer) == (USER + " ", 0, False)
    assert next(converse("digits", 1).segments()).turn == 1
    ahead = [piece for piece in converse("v0", 1).segments() if piece.turn == 0]
    assert "".join(piece.text for piece in ahead) == HUMAN + EXAMPLE + "###"
    assert not any(piece.is_answer for piece in ahead)


def test_an_attached_image_leads_the_first_message() -> None:
    conversation = get_template("digits")
    conversation.append_message("USER", ("q <image>", object(), "Pad"))
    conversation.append_message("ASSISTANT", "a")
    conversation.append_message("USER", ("r", object(), "Pad"))
    conversation.append_message("ASSISTANT", None)
    assert conversation.get_prompt() == "USER: <image>\nq ASSISTANT: a</s>USER: r ASSISTANT:"


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("v0_mmtag", f"{TAGGED}###Human: <Image><image></Image>###Assistant: Received.###Human: q###Assistant:"),
        ("v1_mmtag", f"{TAGGED} USER: <Image><image></Image> ASSISTANT: Received.</s>USER: q ASSISTANT:"),
    ],
)
def test_a_tagged_template_shows_an_attached_image_in_a_turn_of_its_own(name: str, prompt: str) -> None:
    conversation = get_template(name)
    conversation.append_message(conversation.roles[0], ("<image>\nq", object(), "Pad"))
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == prompt
    assert {piece.turn for piece in conversation.segments() if "Received" in piece.text} == {0}
    assert not any(piece.is_answer for piece in conversation.segments())


@pytest.mark.parametrize("name", ["v1", "v0", "mpt", "mistral_instruct", "plain"])
def test_an_empty_answer_is_an_open_one(name: str) -> None:
    conversation = converse(name, 2, is_open=True)
    prompt = conversation.get_prompt()
    conversation.messages[-1][1] = ""
    assert conversation.get_prompt() == prompt


def test_an_open_last_answer_may_be_filled_in_as_clients_do() -> None:
    conversation = converse("mistral_instruct", 1, is_open=True)
    conversation.messages[1][1] = "a1"
    assert conversation.get_prompt() == MISTRAL[0]


def test_a_conversation_can_be_shown_as_a_dictionary() -> None:
    conversation = get_template("v1")
    conversation.append_message("USER", ("q", object(), "Pad"))
    conversation.append_message("ASSISTANT", None)
    assert conversation.dict() == {
        "system": USER,
        "roles": ("USER", "ASSISTANT"),
        "messages": [["USER", "q"], ["ASSISTANT", None]],
        "offset": 0,
        "sep": " ",
        "sep2": "</s>",
    }


@pytest.mark.parametrize("name", conv_templates)
@pytest.mark.parametrize("duplicate", [Conversation.copy, copy.deepcopy])
def test_a_template_stays_as_it_is_when_its_copy_is_used(name: str, duplicate) -> None:
    before = [list(message) for message in conv_templates[name].messages]
    conversation = duplicate(conv_templates[name])
    conversation.append_message("USER", "q")
    assert conversation.messages[:-1] == before == [list(message) for message in conv_templates[name].messages]


def test_the_default_is_vicuna() -> None:
    assert default_conversation.get_prompt() == USER + " " and default_conversation.version == "v1"


@pytest.mark.parametrize("look_up", [get_template, conv_templates.__getitem__])
def test_an_unknown_template_is_named_with_the_known_ones(look_up) -> None:
    with pytest.raises(KeyError, match="template 'v9' is unknown; use one of chatml_direct, default, digits, "):
        look_up("v9")
    assert "v9" not in conv_templates and conv_templates.get("v9") is None
