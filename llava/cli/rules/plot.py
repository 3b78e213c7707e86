"""``fuzzyroe rules plot``: membership functions, control surface and firing rules as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava.cli.rules.source import RuleBaseName, open_rule_base


def plot_command(
    rule_base: RuleBaseName,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")],
) -> None:
    """Draw the terms of every variable, the score over the first two for each term of the third, what a fit fired."""
    from functools import partial

    from fuzzyroe.plots import draw_control_surface, draw_firing, draw_memberships, render_png
    from fuzzyroe.rules.review import evidence_of

    rules = open_rule_base(rule_base)
    completed = rules if rules.is_complete else rules.interpolate()
    output.mkdir(parents=True, exist_ok=True)
    pictures = {"memberships": draw_memberships, "control_surface": draw_control_surface}
    if evidence_of(rules) is not None:
        pictures["firing"] = draw_firing
    for name, draw in pictures.items():
        (output / f"{name}.png").write_bytes(render_png(partial(draw, completed)))
        typer.echo(f"written to {output / name}.png")
    if "firing" not in pictures:
        typer.echo("no firing.png: nothing has fired these rules yet; plot what calibration made, a checkpoint folder")
