"""Tokenizers written in Python, as a checkpoint may bring one: of characters, and of sentencepiece's pieces."""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceTrainer
from transformers import PreTrainedTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
"""Their positions are their ids, in both."""

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
"""Whole pieces, as in the vocabulary of every model that was trained on them."""


class CharacterTokenizer(PreTrainedTokenizer):
    """Every character is a token, ``<s>`` stands in front."""

    def __init__(self, **options: object) -> None:
        self.symbols = [*SPECIAL_TOKENS, "\n", *map(chr, range(0x20, 0x7F))]
        names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
        super().__init__(**{**names, **options})

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    def get_vocab(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    def _tokenize(self, text: str, **options: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.symbols.index(token) if token in self.symbols else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self.symbols[index]

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        return [1, *first, *(second or [])]


class PieceTokenizer(SentencePieceBackend):
    """What transformers made of Llama's ``tokenizer.model`` for years: pieces with blanks in front, bytes, ``<s>``."""

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        return [1, *first, *(second or [])]


def train_pieces(texts: list[str], folder: Path, vocabulary_size: int = 400) -> PieceTokenizer:
    """Train a sentencepiece model of Llama's kind on some texts, and read it slowly.

    Args:
        texts: What to train on.
        folder: Where ``tokenizer.model`` goes.
        vocabulary_size: At least 256 bytes, the special tokens and the characters.
    """
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocabulary_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        user_defined_symbols=list(CHAT_TOKENS),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    return PieceTokenizer(vocab_file=str(folder / "tokenizer.model"), **names)
