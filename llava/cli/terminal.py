"""Output on a terminal: tables, progress, consoles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 160
"""Columns where the output is no terminal: tables keep one line per row."""


def open_console(stderr: bool = False) -> Console:
    """Give a console for results (stdout) or for progress (stderr); plain where it is no terminal."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, bold: Sequence[int] = ()
) -> Table:
    """Make a table whose cells are shown as they are.

    Args:
        title: Title above the table.
        columns: Headings.
        rows: Cells.
        text_columns: Leading columns of text; the others are numbers, aligned right.
        bold: Rows to set apart.
    """
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None, padding=(0, 2, 0, 0)
    )
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index < text_columns else "right", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*map(Text, row), style="bold" if index in bold else None)
    return table


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs, nothing where stderr is no terminal.

    Yields:
        A function of (done, total).
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = open_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
