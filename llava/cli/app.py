"""The command line: one sub-command per function, each importing what is heavy only when it runs."""

from __future__ import annotations

from collections.abc import Callable

import typer

from llava.cli.commands import chat, convert, estimate, explain, report
from llava.cli.data import check_data_command, data_stats_command
from llava.cli.doctor import doctor_command
from llava.cli.rule_commands import rules_app
from llava.cli.terminal import FriendlyGroup

COMMANDS: dict[str, Callable[..., None]] = {
    "check-data": check_data_command,
    "data-stats": data_stats_command,
    "convert": convert,
    "explain": explain,
    "estimate": estimate,
    "doctor": doctor_command,
    "report": report,
}
"""Commands by name, in the order of the help text; ``chat`` and ``rules`` are added below."""

app = typer.Typer(
    cls=FriendlyGroup,
    help="Layer skipping for LLaVA-1.5, routed by a fuzzy rule base.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(command)
# chat reads its flags itself: they are LLaVA's, in argparse
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("chat", add_help_option=False, context_settings=PASS_ON)(chat)
app.add_typer(rules_app, name="rules")


def main() -> None:
    """Run the command ``fuzzyroe``."""
    app(prog_name="fuzzyroe")
