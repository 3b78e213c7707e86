"""The command line: one sub-command per file, each importing what is heavy only when it runs."""

from __future__ import annotations

import typer

from llava.cli.chat import chat_command
from llava.cli.check_data import check_data_command
from llava.cli.convert import convert_command
from llava.cli.data_stats import data_stats_command
from llava.cli.doctor import doctor_command
from llava.cli.errors import FriendlyGroup
from llava.cli.estimate import estimate_command
from llava.cli.explain import explain_command
from llava.cli.report import report_command
from llava.cli.rules import rules_app

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For a command that reads its flags itself."""

app = typer.Typer(
    cls=FriendlyGroup,
    help="Layer skipping for LLaVA-1.5, routed by a fuzzy rule base.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("check-data")(check_data_command)
app.command("data-stats")(data_stats_command)
app.command("convert")(convert_command)
app.add_typer(rules_app, name="rules")
app.command("explain")(explain_command)
app.command("estimate")(estimate_command)
app.command("chat", add_help_option=False, context_settings=PASS_ON)(chat_command)
app.command("doctor")(doctor_command)
app.command("report")(report_command)


def main() -> None:
    """Run the command ``fuzzyroe``."""
    app(prog_name="fuzzyroe")
