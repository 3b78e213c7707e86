"""``fuzzyroe rules plot``: membership functions and control surface as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava.cli.rules.source import RuleBaseName, open_rule_base


def plot_command(
    rule_base: RuleBaseName,
    output: Annotated[Path, typer.Option(help="Folder for memberships.png and control_surface.png.")],
) -> None:
    """Draw the terms of every variable, and the score over the first two for each term of the third."""
    from functools import partial

    from llava.eval.figures import draw_control_surface, draw_memberships, render_png

    rules = open_rule_base(rule_base)
    completed = rules if rules.is_complete else rules.interpolate()
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in (("memberships", draw_memberships), ("control_surface", draw_control_surface)):
        (output / f"{name}.png").write_bytes(render_png(partial(draw, completed)))
        typer.echo(f"written to {output / name}.png")
