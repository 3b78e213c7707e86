"""``fuzzyroe rules export``: a rule base for other fuzzy tools, or under a name of its own."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llava.cli.rules.source import RuleBaseName, open_rule_base, refuse_overwrite


class Format(str, Enum):
    """Dialects that express the rules exactly."""

    fcl = "fcl"
    fis = "fis"
    yaml = "yaml"


def export_command(
    rule_base: RuleBaseName,
    format: Annotated[Format, typer.Option(help="fcl: Fuzzy Control Language; fis: MATLAB; yaml: our own.")],
    name: Annotated[str | None, typer.Option(help="Name to give it; its own if left out.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; stdout if left out.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file if it exists.")] = False,
) -> None:
    """Write a rule base for other tools, or what calibration made of it; combinations without a rule are left out."""
    from dataclasses import replace

    from fuzzyroe.rules.export import to_fcl, to_fis
    from fuzzyroe.rules.yaml_io import dump_rule_base

    rules = open_rule_base(rule_base)
    named = rules if name is None else replace(rules, name=name)
    text = {Format.fcl: to_fcl, Format.fis: to_fis, Format.yaml: dump_rule_base}[format](named)
    if output is None:
        typer.echo(text, nl=False)
        return
    refuse_overwrite(output, overwrite)
    output.write_text(text, encoding="utf-8")
    typer.echo(f"written to {output}")
