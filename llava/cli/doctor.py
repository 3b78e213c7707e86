"""``fuzzyroe doctor``: what of this machine and its packages stands in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BROKEN = 1
"""Exit code where something must be mended first."""

MARKS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
STYLES = {"ok": "green", "note": "yellow", "fail": "bold red"}


def doctor_command(
    folder: Annotated[Path, typer.Option(help="Folder that outputs would be written to.", exists=True)] = Path("."),
) -> None:
    """Look at Python, packages, GPUs and limits; exit code 1 if something must be mended."""
    from rich.text import Text

    from llava.cli.terminal import open_console
    from llava.model.environment import examine

    console = open_console()
    failed = 0
    for finding in examine(folder):
        failed += finding.state == "fail"
        line = Text.assemble((MARKS[finding.state], STYLES[finding.state]), f"  {finding.name:<14} {finding.found}")
        if finding.remedy:
            line.append(f"\n{'':21}{finding.remedy}", style="dim")
        console.print(line)
    if failed:
        console.print(f"{failed} to mend", style="bold")
        raise typer.Exit(BROKEN)
