"""``fuzzyroe report``: the closing tables and page of several evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    evaluations: Annotated[list[Path], typer.Argument(help="evaluation.json files, at least one of a dense run.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html, report.json and figures.")],
    stages: Annotated[
        list[Path] | None, typer.Option(help="Output folder of a stage; repeat it for each, in order.")
    ] = None,
) -> None:
    """Compare runs on the same questions and write a page that needs nothing else."""
    from llava.cli.terminal import make_table, open_console
    from llava.eval.report import load_report
    from llava.eval.report_page import write_report
    from llava.eval.tables import report_tables

    report = load_report(evaluations, stages or [])
    console = open_console()
    for table in report_tables(report):
        console.print(make_table(table.title, table.columns, table.rows, bold=sorted(table.highlighted)))
        console.print()
    files = write_report(report, output)
    console.print(f"written to {output}: {', '.join(path.name for path in files)}", markup=False, soft_wrap=True)
