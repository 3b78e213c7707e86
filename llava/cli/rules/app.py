"""The group of commands ``fuzzyroe rules``."""

from __future__ import annotations

import typer

from llava.cli.rules.check import check_command
from llava.cli.rules.complete import complete_command
from llava.cli.rules.diff import diff_command
from llava.cli.rules.export import export_command
from llava.cli.rules.plot import plot_command
from llava.cli.rules.show import show_command
from llava.cli.terminal import FriendlyGroup

rules_app = typer.Typer(
    cls=FriendlyGroup, help="Look at a fuzzy rule base, complete it, export it.", no_args_is_help=True
)
rules_app.command("show")(show_command)
rules_app.command("check")(check_command)
rules_app.command("complete")(complete_command)
rules_app.command("export")(export_command)
rules_app.command("plot")(plot_command)
rules_app.command("diff")(diff_command)
