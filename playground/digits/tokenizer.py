"""Train a small BPE tokenizer, built like Llama's, on the conversations of the digits dataset.

    python -m playground.digits.tokenizer --data playground/data/digits --output playground/data/digits/tokenizer

Words begin with "▁" as in Llama; the first word of a text gets one, text after a special token does not. Any text of
printable ASCII and line feeds can be written; other characters become ``<unk>``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
"""Their positions are their ids."""
VOCABULARY_SIZE = 320
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_ALPHABET = [chr(code) for code in range(0x21, 0x7F)] + ["\n", _SPACE]


def conversation_texts(records: list[dict]) -> Iterator[str]:
    """Give the text of each turn between special tokens, as the conversation template writes it."""
    for record in records:
        messages = [message["value"] for message in record["conversations"]]
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            yield from f"USER: {question} ASSISTANT: {answer}".split("<image>")


def train_tokenizer(records: list[dict], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Train a tokenizer on LLaVA records; it puts ``<s>`` before a text, and its ``image_token`` is ``<image>``.

    Args:
        records: The records.
        vocabulary_size: Number of tokens, special ones and alphabet included.

    Raises:
        ValueError: If the vocabulary has no room for the alphabet.
    """
    smallest = len(SPECIAL_TOKENS) + len(_ALPHABET)
    if vocabulary_size < smallest:
        raise ValueError(
            f"vocabulary_size is {vocabulary_size}; special tokens and alphabet alone need {smallest}; "
            f"give {VOCABULARY_SIZE}, or at least {smallest}."
        )
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[0], fuse_unk=True))
    # Line feeds and punctuation stand alone: a word is the same token before a comma as before a space.
    alone = pre_tokenizers.Split("\n", behavior="isolated"), pre_tokenizers.Punctuation(behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), *alone])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(conversation_texts(records), trainer)
    unknown, begin, end, padding, image = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B:1",
        special_tokens=[(begin, SPECIAL_TOKENS.index(begin))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=padding,
        extra_special_tokens={"image_token": image},
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="right",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m playground.digits.tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--vocabulary-size", type=int, default=VOCABULARY_SIZE)
    options = parser.parse_args(arguments)
    records = json.loads((options.data / "digits_train.json").read_text())
    tokenizer = train_tokenizer(records, options.vocabulary_size)
    tokenizer.save_pretrained(options.output)
    print(f"{options.output}: {len(tokenizer)} tokens from {len(records)} records")


if __name__ == "__main__":
    main()
