"""Mistakes of users as one line on stderr; everything else keeps its traceback."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

OUR_PACKAGES = ("fuzzyroe", "llava")
USER_ERROR = 2
"""Exit code of a mistake of the user's, as for unknown options."""


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
    return isinstance(error, OSError) or _raised_in(error.__traceback__).split(".")[0] in OUR_PACKAGES


def describe_error(error: Exception) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        name = f" {error.filename}" if error.filename else ""
        return f"cannot open{name} ({error.strerror}); check the path and your rights to it."
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())


def _raised_in(traceback: TracebackType | None) -> str:
    """Name of the module that raised."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
