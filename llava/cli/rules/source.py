"""Which rule base a command means: a shipped name, a YAML file, or a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fuzzyroe.rules.rule_base import FuzzyRuleBase

RuleBaseName = Annotated[
    str, typer.Argument(help="Name of a shipped rule base, a YAML file, or a checkpoint folder with one.")
]


def open_rule_base(name: str) -> FuzzyRuleBase:
    """Load a rule base as it was written.

    Args:
        name: A shipped name such as ``default``, a path ending in ``.yaml``, or a folder with ``rule_base.yaml``.
    """
    from fuzzyroe.rules.yaml_io import load_rule_base, shipped_rule_bases

    is_folder = name not in shipped_rule_bases() and Path(name).is_dir()
    return load_rule_base(str(Path(name) / "rule_base.yaml") if is_folder else name)


def refuse_overwrite(output: Path, overwrite: bool) -> None:
    """Refuse to replace a file unless asked to.

    Raises:
        FileExistsError: If the file exists and ``overwrite`` is false.
    """
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; commands replace nothing unasked. Name another, or add --overwrite.")
