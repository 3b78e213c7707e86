"""Promises of encoding a conversation: what is learned, whose turn it is, and that inference reads the same ids."""

from __future__ import annotations

import pytest

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates, get_template
from llava.data.preprocess import encode_conversation, encode_prompt
from llava.data.records import DataError, Turn
from llava.mm_utils import tokenizer_image_token
from slow_tokenizers import CharacterTokenizer

IMAGE = 4
M = IGNORE_INDEX

CONVERSATIONS = {
    "one turn": [Turn("<image>\nWhich digit is in the middle?", "seven")],
    "image last": [Turn("Which digit?\n<image>", "seven")],
    "three turns": [Turn("<image>\nHow many?", "4"), Turn("And below?", "none, I think."), Turn("Why?", "Look: dots")],
    "text only": [Turn("Add two and five.", "7"), Turn("Again!", "14")],
    "two images": [Turn("<image>\n<image>\nWhich is larger?", "The 2nd"), Turn("Sure?", "yes")],
    "an image later": [Turn("Hello!", "Hi"), Turn("<image>\nWhat is it?", "red"), Turn("And now?", "blue")],
}


def encode(turns: list[Turn], tokenizer, template: str = "digits", num_image_tokens: int = 2, **options):
    return encode_conversation(turns, tokenizer, get_template(template), num_image_tokens, IMAGE, **options)


def encode_open(turns: list[Turn], tokenizer, template: str, num_image_tokens: int = 2):
    """The prompt of the last turn, whose question is written as training reorders it."""
    conversation = get_template(template)
    for turn in turns:
        question = turn.question
        if question.endswith("\n<image>"):
            question = "<image>\n" + question.removesuffix("\n<image>")
        conversation.append_message(conversation.roles[0], question.replace("<image>", conversation.image_markup))
        conversation.append_message(conversation.roles[1], turn.answer)
    conversation.messages[-1][1] = None
    return encode_prompt(conversation, tokenizer, num_image_tokens, IMAGE)


def test_marks_of_two_turns_with_an_image_are_as_written_by_hand(word_tokenizer) -> None:
    encoded = encode([Turn("<image>\nw1 w2", "w3"), Turn("w4", "w5 w6")], word_tokenizer)
    # <s> USER : [image] w1 w2 ASSISTANT : w3 </s> USER : w4 ASSISTANT : w5 w6 </s>
    assert encoded.input_ids == [1, 5, 7, 4, 4, 9, 10, 6, 7, 11, 2, 5, 7, 12, 6, 7, 13, 14, 2]
    assert encoded.labels == [M, M, M, M, M, M, M, M, M, 11, 2, M, M, M, M, M, 13, 14, 2]
    assert encoded.turn_ids == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]
    assert encoded.num_trained == 5 and not encoded.is_truncated


def test_marks_of_a_text_with_a_system_prompt_are_as_written_by_hand(word_tokenizer) -> None:
    template = get_template("v1")
    template.system = "w20 w21"
    encoded = encode_conversation([Turn("w1", "w2 w3")], word_tokenizer, template, 2, IMAGE)
    # <s> w20 w21 USER : w1 ASSISTANT : w2 w3 </s>
    assert encoded.input_ids == [1, 28, 29, 5, 7, 9, 6, 7, 10, 11, 2]
    assert encoded.labels == [M, M, M, M, M, M, M, M, 10, 11, 2]
    assert encoded.turn_ids == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_marks_of_an_image_in_a_later_turn_are_as_written_by_hand(word_tokenizer) -> None:
    encoded = encode([Turn("w1", "w2"), Turn("<image>\nw3", "w4")], word_tokenizer)
    # <s> USER : w1 ASSISTANT : w2 </s> USER : [image] w3 ASSISTANT : w4 </s>
    assert encoded.labels == [M, M, M, M, M, M, 10, 2, M, M, M, M, M, M, M, 12, 2]
    assert encoded.turn_ids == [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 0, 0, 2, 2, 2, 2, 2]


def test_the_marker_of_an_image_leads_its_question(word_tokenizer) -> None:
    expected = encode([Turn("<image>\nw1 w2", "w3")], word_tokenizer)
    for question in ("w1 w2\n<image>", "w1 w2 <image>", " <image>w1 w2 ", "w1 <image> w2"):
        assert encode([Turn(question, "w3")], word_tokenizer).input_ids == expected.input_ids
    interleaved = encode([Turn("<image> w1 <image> w2", "w3")], word_tokenizer).input_ids
    assert interleaved == [1, 5, 7, 4, 4, 9, 4, 4, 10, 6, 7, 11, 2]


@pytest.mark.parametrize("template", conv_templates)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_learned_tokens_spell_the_answers(template: str, name: str, bpe_tokenizer) -> None:
    turns = CONVERSATIONS[name]
    encoded = encode(turns, bpe_tokenizer, template)
    for number, turn in enumerate(turns, start=1):
        learned = [
            label for label, own in zip(encoded.labels, encoded.turn_ids, strict=True) if own == number and label != M
        ]
        end = get_template(template).sep2 or get_template(template).sep
        spelled = bpe_tokenizer.decode(learned).strip(" ")
        assert spelled.removesuffix(end).strip(" ") == turn.answer and spelled.endswith(end)
    assert encoded.num_trained == sum(label != M for label in encoded.labels)
    learned = [(i, label) for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != M]
    assert all(own == label for own, label in learned)


@pytest.mark.parametrize("template", conv_templates)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_is_a_prefix_of_its_training_encoding(template: str, name: str, bpe_tokenizer) -> None:
    turns = CONVERSATIONS[name]
    for count in range(1, len(turns) + 1):
        encoded = encode(turns[:count], bpe_tokenizer, template)
        ids, turn_ids = encode_open(turns[:count], bpe_tokenizer, template)
        assert 0 < len(ids) < len(encoded.input_ids)
        assert encoded.input_ids[: len(ids)] == ids
        assert encoded.turn_ids[: len(ids)] == turn_ids
        assert encoded.labels[len(ids)] != M, "the token after the prompt is the first that is learned"


@pytest.mark.parametrize("template", conv_templates)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_evaluation(template: str, name: str, bpe_tokenizer) -> None:
    turns = [turn for turn in CONVERSATIONS[name] if not turn.question.endswith("<image>")]
    conversation = get_template(template)
    for turn in turns:
        question = turn.question.replace("<image>", conversation.image_markup)
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], turn.answer)
    expected = tokenizer_image_token(conversation.get_prompt(), bpe_tokenizer, image_token_index=IMAGE)
    if turns:
        assert encode(turns, bpe_tokenizer, template, num_image_tokens=1).input_ids == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_turn_zero_ends_with_the_image_of_the_first_question(name: str, bpe_tokenizer) -> None:
    turns = CONVERSATIONS[name]
    encoded = encode(turns, bpe_tokenizer, "v1")
    assert set(encoded.turn_ids) == set(range(len(turns) + 1))
    images = [turn for i, turn in zip(encoded.input_ids, encoded.turn_ids, strict=True) if i == IMAGE]
    assert set(images) <= {0}
    text = [turn for i, turn in zip(encoded.input_ids, encoded.turn_ids, strict=True) if i != IMAGE]
    assert text == sorted(text)
    assert all(turn > 0 for turn, label in zip(encoded.turn_ids, encoded.labels, strict=True) if label != M)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_truncation_keeps_whole_images_or_refuses(name: str, bpe_tokenizer) -> None:
    whole = encode(CONVERSATIONS[name], bpe_tokenizer)
    positions = [index for index, token in enumerate(whole.input_ids) if token == IMAGE]
    for length in range(1, len(whole.input_ids) + 2):
        if positions and length <= positions[-1]:
            message = f"end at position {positions[-1] + 1}, beyond model_max_length {length}"
            with pytest.raises(DataError, match=message):
                encode(CONVERSATIONS[name], bpe_tokenizer, max_length=length)
            continue
        cut = encode(CONVERSATIONS[name], bpe_tokenizer, max_length=length)
        assert cut.input_ids == whole.input_ids[:length] and cut.labels == whole.labels[:length]
        assert cut.turn_ids == whole.turn_ids[:length]
        assert cut.input_ids.count(IMAGE) == whole.input_ids.count(IMAGE)
        assert cut.is_truncated == (length < len(whole.input_ids))


def test_a_slow_tokenizer_of_characters_spells_answers_and_their_ends() -> None:
    slow = encode(CONVERSATIONS["three turns"], CharacterTokenizer(), "v1")
    symbols = CharacterTokenizer().symbols
    learned = [symbols[token] for token, label in zip(slow.input_ids, slow.labels, strict=True) if label != M]
    assert "".join(learned) == " 4</s> none, I think.</s> Look: dots</s>"


def test_a_slow_tokenizer_that_rewrites_its_text_is_refused() -> None:
    class Lowering(CharacterTokenizer):
        def _tokenize(self, text: str, **options: object) -> list[str]:
            return list(text.lower())

    with pytest.raises(ValueError, match="Tokenizer Lowering gives the piece 'u', which is not in the text at 'USER:"):
        encode([Turn("w1", "w2")], Lowering())
