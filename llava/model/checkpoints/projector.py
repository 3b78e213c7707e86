"""A projector that was trained and saved on its own."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llava.model.checkpoints.key_maps import PROJECTOR, list_names, to_released
from llava.model.checkpoints.weight_files import read_tensors

PROJECTOR_NAMES = tuple(f"{PROJECTOR}linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias"))
"""Released names of its tensors."""


def read_projector(file: str | Path) -> dict[str, Tensor]:
    """Read a projector.

    Args:
        file: LLaVA's ``mm_projector.bin``, or a safetensors file under the names of any layout.

    Returns:
        Released name -> tensor, four of them.

    Raises:
        ValueError: If other tensors are there, or some are missing.
    """
    tensors = to_released(read_tensors(file), str(file))
    wrong = tensors.keys() ^ set(PROJECTOR_NAMES)
    if wrong:
        raise ValueError(
            f"{file} is no projector of type mlp2x_gelu: {list_names(wrong)} missing or unexpected; exactly "
            f"{', '.join(PROJECTOR_NAMES)}, or LLaVA's names of these, are needed. Name another file."
        )
    return tensors
