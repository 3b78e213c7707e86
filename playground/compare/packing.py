"""Right and wrong answers as short text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(bits: Sequence[int]) -> str:
    """Bits as hexadecimal digits, the first bit first; the last byte is filled up with zeros."""
    return np.packbits(np.array(bits, dtype=np.uint8)).tobytes().hex()


def unpack(digits: str, count: int) -> np.ndarray:
    """The bits of ``pack``, (count,) of 0 and 1."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))[:count]
