"""``fuzzyroe rules``: looking at rule bases and changing them."""

from llava.cli.rules.app import rules_app

__all__ = ["rules_app"]
