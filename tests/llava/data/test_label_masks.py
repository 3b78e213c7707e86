"""What is learned of a conversation, for every template and kind of tokenizer, against strings marked by hand."""

from __future__ import annotations

from itertools import groupby

import pytest

from learned_prompts import ANSWERS, QUESTIONS, TEMPLATES, marked_prompt
from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates, get_template
from llava.data.preprocess import EncodedConversation, encode_conversation
from llava.data.records import Turn
from playground.digits.tokenizer import train_tokenizer
from slow_tokenizers import CharacterTokenizer, train_pieces

IMAGE, NUM_IMAGE_TOKENS = 900, 3
TEXTS = [marked_prompt(name, 3, False).translate({0xAB: "", 0xBB: ""}) for name in TEMPLATES]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Fast with merges, slow of characters, slow of sentencepiece's pieces; the text they saw makes long tokens."""
    talk = [{"conversations": [{"value": text}, {"value": "4"}]} for text in TEXTS]
    return {
        "fast": train_tokenizer(talk, 320),
        "characters": CharacterTokenizer(),
        "pieces": train_pieces(TEXTS, tmp_path_factory.mktemp("pieces")),
    }


def read_marks(encoded: EncodedConversation, tokenizer: object) -> str:
    """The text of the tokens, every image as one ``<image>``, learned stretches between « and ».

    A tokenizer may put a blank in front of a text and behind an image or a special token; it is no part of the prompt
    and is left out.
    """
    shown, is_front = "", True
    for is_learned, run in groupby(zip(encoded.input_ids, encoded.labels, strict=True), lambda t: t[1] != IGNORE_INDEX):
        shown += "«" * is_learned
        for token_id, _ in run:
            if token_id == IMAGE:
                shown, is_front = shown + "I", True
                continue
            piece = tokenizer.convert_ids_to_tokens(token_id).replace("▁", " ")
            piece = bytes.fromhex(piece[3:5]).decode() if piece.startswith("<0x") else piece
            is_special = piece in ("<s>", "</s>")
            if is_front and piece.startswith(" ") and not isinstance(tokenizer, CharacterTokenizer):
                piece = piece[1:]
            shown, is_front = shown + piece, is_special or (is_front and not piece)
        shown += "»" * is_learned
    return shown.replace("I" * NUM_IMAGE_TOKENS, "<image>").removeprefix("<s>")


def test_every_template_is_marked() -> None:
    assert set(TEMPLATES) == set(conv_templates)


@pytest.mark.parametrize("kind", ["fast", "characters", "pieces"])
@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("num_turns", [1, 2, 3])
@pytest.mark.parametrize("name", conv_templates)
def test_what_is_learned_is_as_marked_by_hand(
    name: str, num_turns: int, has_image: bool, kind: str, tokenizers: dict[str, object]
) -> None:
    turns = [Turn(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)][:num_turns]
    if has_image:
        turns[0] = Turn(f"<image>\n{QUESTIONS[0]}", ANSWERS[0])
    tokenizer = tokenizers[kind]
    encoded = encode_conversation(turns, tokenizer, get_template(name), NUM_IMAGE_TOKENS, IMAGE)
    assert read_marks(encoded, tokenizer) == marked_prompt(name, num_turns, has_image)
    assert all(label in (IGNORE_INDEX, own) for own, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert encoded.input_ids.count(IMAGE) == NUM_IMAGE_TOKENS * has_image
    learned = {turn for turn, label in zip(encoded.turn_ids, encoded.labels, strict=True) if label != IGNORE_INDEX}
    assert learned == set(range(1, num_turns + 1))
