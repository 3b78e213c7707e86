"""``fuzzyroe rules complete``: a rule for every combination of terms, written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava.cli.rules.source import RuleBaseName, open_rule_base, refuse_overwrite


def complete_command(
    rule_base: RuleBaseName,
    output: Annotated[Path, typer.Option(help="YAML file to write.")],
    method: Annotated[str | None, typer.Option(help="Interpolation method; the rule base's own if left out.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file if it exists.")] = False,
) -> None:
    """Complete missing rules by fuzzy rule interpolation; given ones keep every bit."""
    from fuzzyroe.rules.yaml_io import save_rule_base

    refuse_overwrite(output, overwrite)
    rules = open_rule_base(rule_base)
    completed = rules.interpolate(method)
    save_rule_base(completed, output)
    typer.echo(
        f"{len(rules.missing_cells())} of {rules.num_rules} rules interpolated by {completed.interpolation.method}, "
        f"written to {output}"
    )
