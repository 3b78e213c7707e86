"""Terminal output: tables, progress, and the mistakes of users as one line on stderr."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

PIPE_WIDTH = 160
"""Columns where the output is no terminal: tables keep one line per row."""

OUR_PACKAGES = ("fuzzyroe", "llava")

USER_ERROR = 2
"""Exit code of a user's mistake, as for unknown options."""


def open_console(stderr: bool = False) -> Console:
    """Give a console for results (stdout) or for progress (stderr); plain where it is no terminal."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def say(*lines: str, style: str | None = None) -> None:
    """Print lines to stdout as they are; square brackets are no markup, and no line is cut."""
    open_console().print("\n".join(lines), style=style, markup=False, soft_wrap=True)


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, bold: Sequence[int] = ()
) -> Table:
    """Make a table whose cells are shown as they are; columns behind the leading ``text_columns`` hold numbers.

    Numbers are aligned right, and the rows whose indices are in ``bold`` are set apart.
    """
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None, padding=(0, 2, 0, 0)
    )
    # Text, because rich would read square brackets in a plain string as markup
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index < text_columns else "right", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*map(Text, row), style="bold" if index in bold else None)
    return table


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr, if it is a terminal, while the block runs; yields a function of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = open_console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class FriendlyGroup(TyperGroup):
    """A group of commands that turns the errors our packages raise on purpose into one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; exit with ``USER_ERROR`` if it raises a ValueError or KeyError of ours, or any OSError."""
        try:
            return super().invoke(ctx)
        except (ValueError, KeyError, OSError) as error:
            if not is_user_error(error):
                raise
            typer.echo(f"fuzzyroe: {describe_error(error)}", err=True)
            raise typer.Exit(USER_ERROR) from error


def is_user_error(error: Exception) -> bool:
    """Whether our code raised it as an answer to what the user asked for.

    A ValueError from inside numpy or torch is a bug of ours; hiding its traceback would hide the bug.
    """
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, OSError) or modules[-1].partition(".")[0] in OUR_PACKAGES


def describe_error(error: Exception) -> str:
    """Describe an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        name = f" {error.filename}" if error.filename else ""
        return f"cannot open{name} ({error.strerror}); check the path and your rights to it."
    # str() of a KeyError puts the message in quotes
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())
