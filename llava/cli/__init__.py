"""The command ``fuzzyroe``, the only place that writes to a terminal in colour."""

from llava.cli.app import main

__all__ = ["main"]
