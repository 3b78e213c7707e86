"""``fuzzyroe chat``: talk with a checkpoint about an image."""

from __future__ import annotations

import typer


def chat_command(context: typer.Context) -> None:
    """Talk with a checkpoint about an image; the flags are those of ``python -m llava.serve.cli``."""
    from llava.serve.cli import main

    main(context.args, prog="fuzzyroe chat")
