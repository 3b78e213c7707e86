"""Fixtures of these tests: a tiny checkpoint that answers."""

from answering import checkpoint, generator, images, routed, tokenizer

__all__ = ["checkpoint", "generator", "images", "routed", "tokenizer"]
