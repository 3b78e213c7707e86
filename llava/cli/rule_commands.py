"""The commands ``fuzzyroe rules``: show, check, complete, compare, draw and export rule bases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llava.cli.terminal import USER_ERROR, FriendlyGroup, make_table, open_console, say

if TYPE_CHECKING:
    from fuzzyroe.rules.explain import Review
    from fuzzyroe.rules.rule_base import FuzzyRuleBase

# fuzzyroe is imported inside the functions: numpy and torch would make every --help slow
rules_app = typer.Typer(
    cls=FriendlyGroup, help="Look at a fuzzy rule base, complete it, export it.", no_args_is_help=True
)

RuleBaseName = Annotated[
    str, typer.Argument(help="Name of a shipped rule base, a YAML file, or a checkpoint folder with one.")
]
Overwrite = Annotated[bool, typer.Option(help="Replace the file if it exists.")]
_EMPTY = "–"


@rules_app.command("show")
def show(rule_base: RuleBaseName) -> None:
    """Show variables and rules, with what the expert gave, what was interpolated, what was fitted and to how much."""
    from fuzzyroe.rules.explain import evidence_of

    rules, console = open_rule_base(rule_base), open_console()
    names = [variable.name for variable in rules.antecedents]
    say(f"{rules.name}: {rules.description}" if rules.description else rules.name, style="bold")
    variables = [
        (
            variable.name,
            ", ".join(f"{term} {peak:.3f}" for term, peak in zip(variable.terms, variable.peaks, strict=True)),
            f"[{variable.universe[0]:g}, {variable.universe[1]:g}]",
            variable.monotone or "unknown",
        )
        for variable in rules.antecedents
    ]
    # peaks, because calibration moves them to the quantiles of the features
    headings = ("name", "terms with their peaks", "universe", "effect")
    console.print(make_table("\nVariables", headings, variables, text_columns=4))
    evidence = evidence_of(rules)  # examples that informed each rule in the fit
    # the values that fitting started from stand beside the fitted ones
    prior = rules.unfitted()
    completed = prior if prior.is_complete else prior.interpolate()
    rows = []
    for cell in rules.cells():
        value, origin = f"{completed.output_table[cell]:.3f}", completed.source[cell]
        by_origin = [value if origin == name else _EMPTY for name in ("expert", "interpolated")]
        fitted = f"{rules.output_table[cell]:.3f}" if rules.source[cell] == "fitted" else _EMPTY
        examples = [] if evidence is None else [f"{evidence[cell]:.1f}"]
        rows.append([*rules.terms_of(cell), *by_origin, fitted, *examples])
    columns = (*names, "expert", "interpolated", "fitted", *(() if evidence is None else ("examples",)))
    lower, upper = rules.consequent.output_range
    title = f"\nRules for {rules.consequent.name} in [{lower:g}, {upper:g}]"
    console.print(make_table(title, columns, rows, text_columns=len(names)))
    if not rules.is_complete:
        say(
            f"{len(rules.missing_cells())} of {rules.num_rules} combinations have no rule in the file; the "
            f"interpolated values are what '{rules.interpolation.method}' concludes",
            style="dim",
        )


@rules_app.command("check")
def check(
    rule_base: RuleBaseName,
    tolerance: Annotated[
        float, typer.Option(help="Accepted spread of completion methods, share of the universe.", min=0, max=1)
    ] = 0.1,
) -> None:
    """Check coverage, directions, conflicts and completion; exit 2 if rules contradict each other."""
    from fuzzyroe.rules.explain import review_rule_base

    # opening it refuses two rules for one combination of terms
    review = review_rule_base(open_rule_base(rule_base), tolerance=tolerance)
    say(*_review_lines(review, tolerance))
    if not review.is_ok:
        raise typer.Exit(USER_ERROR)


def _review_lines(review: Review, tolerance: float) -> Iterator[str]:
    """What a review says, a heading for each check and a line for each finding."""
    share = review.num_given / review.num_rules
    yield f"coverage: the expert gives {review.num_given} of {review.num_rules} rules ({share:.0%})"
    yield from (f"  to be interpolated: {', '.join(terms)}" for terms in review.missing)
    yield "conflicts: none, every combination of terms has at most one rule"
    sets = {"expert rules": review.contradictions, "rules in use": review.fitted_contradictions}
    for name, pairs in sets.items():
        yield f"directions, {name}: {len(pairs) or 'no'} contradiction{'' if len(pairs) == 1 else 's'}"
        for lower, upper, excess in pairs:
            yield f"  ({', '.join(lower)}) concludes {excess:.3f} more than ({', '.join(upper)}) and should not"
    yield from (f"  {variable} has no declared direction, so it is not checked" for variable in review.undirected)
    yield f"unused terms: {len(review.unused_terms) or 'none'}"
    yield from (f"  no rule of the expert mentions {variable} = {term}" for variable, term in review.unused_terms)
    idle = "unknown, these rules were not fitted to examples yet" if review.idle is None else len(review.idle) or "none"
    yield f"unused rules: {idle}"
    for terms, count in review.idle or ():
        yield f"  {', '.join(terms)}: informed by {count:.2f} examples of the fit; its prior and neighbours decide"
    number = f"methods differ by more than {tolerance:.0%} of the universe on {len(review.disagreements) or 'no'} rules"
    yield f"completion: {number if review.missing else 'nothing to complete'}"
    for item in review.disagreements:
        values = ", ".join(f"{method} {value:.3f}" for method, value in item.values.items())
        yield f"  {', '.join(item.terms)}: {values}; consider giving this rule yourself"


@rules_app.command("complete")
def complete(
    rule_base: RuleBaseName,
    output: Annotated[Path, typer.Option(help="YAML file to write.")],
    method: Annotated[str | None, typer.Option(help="Interpolation method; the rule base's own if left out.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Complete missing rules by fuzzy rule interpolation; given ones keep every bit."""
    from fuzzyroe.rules.yaml_io import save_rule_base

    _refuse_overwrite(output, overwrite)  # before any work
    rules = open_rule_base(rule_base)
    completed = rules.interpolate(method)
    save_rule_base(completed, output)
    number, used = len(rules.missing_cells()), completed.interpolation.method
    say(f"{number} of {rules.num_rules} rules interpolated by {used}, written to {output}")


@rules_app.command("export")
def export(
    rule_base: RuleBaseName,
    format: Annotated[
        Literal["fcl", "fis", "yaml"],
        typer.Option(help="fcl: Fuzzy Control Language; fis: MATLAB; yaml: our own. All express the rules exactly."),
    ],
    name: Annotated[str | None, typer.Option(help="Name to give it; its own if left out.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; stdout if left out.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a rule base for other tools, or what calibration made of it; combinations without a rule are left out."""
    from dataclasses import replace

    from fuzzyroe.rules.export import to_fcl, to_fis
    from fuzzyroe.rules.yaml_io import dump_rule_base

    rules = open_rule_base(rule_base)
    named = rules if name is None else replace(rules, name=name)
    text = {"fcl": to_fcl, "fis": to_fis, "yaml": dump_rule_base}[format](named)
    if output is None:
        typer.echo(text, nl=False)
        return
    _refuse_overwrite(output, overwrite)
    output.write_text(text, encoding="utf-8")
    say(f"written to {output}")


@rules_app.command("plot")
def plot(
    rule_base: RuleBaseName,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")],
) -> None:
    """Draw the terms of every variable, the score over the first two for each term of the third, what a fit fired."""
    from functools import partial

    from fuzzyroe.plots import draw_control_surface, draw_firing, draw_memberships, render_png
    from fuzzyroe.rules.explain import evidence_of

    rules = open_rule_base(rule_base)
    completed = rules if rules.is_complete else rules.interpolate()
    output.mkdir(parents=True, exist_ok=True)
    pictures = {"memberships": draw_memberships, "control_surface": draw_control_surface}
    if evidence_of(rules) is not None:
        pictures["firing"] = draw_firing
    for name, draw in pictures.items():
        (output / f"{name}.png").write_bytes(render_png(partial(draw, completed)))
        say(f"written to {output / name}.png")
    if "firing" not in pictures:
        say("no firing.png: nothing has fired these rules yet; plot what calibration made, a checkpoint folder")


@rules_app.command("diff")
def diff(first: RuleBaseName, second: RuleBaseName) -> None:
    """List differing variables, options and rules; names and descriptions do not count."""
    from fuzzyroe.rules.explain import compare_rule_bases

    rules = open_rule_base(first)
    difference = compare_rule_bases(rules, open_rule_base(second))
    if difference.is_empty:
        say("no difference")
        return
    if difference.settings:
        say(*difference.settings)
    if difference.rules is None:
        say("the variables or terms differ, so rules cannot be lined up")
        return
    rows = []
    for rule in difference.rules:
        values = [_EMPTY if value is None else f"{value:.3f}" for value in (rule.first, rule.second)]
        change = "" if rule.first is None or rule.second is None else f"{rule.second - rule.first:+.3f}"
        origins = dict.fromkeys((rule.first_origin, rule.second_origin))  # one where both are the same
        rows.append([*rule.terms, *values, change, " -> ".join(origins)])
    columns = (*(variable.name for variable in rules.antecedents), first, second, "change", "origin")
    title = f"\n{len(rows)} of {rules.num_rules} rules differ"
    open_console().print(make_table(title, columns, rows, text_columns=len(rules.antecedents)))


def open_rule_base(name: str) -> FuzzyRuleBase:
    """Load a rule base by a shipped name, a path ending in ``.yaml``, or a folder with ``rule_base.yaml``."""
    from fuzzyroe.rules.yaml_io import load_rule_base, shipped_rule_bases

    # a shipped name wins over a folder of that name in the working directory
    is_folder = name not in shipped_rule_bases() and Path(name).is_dir()
    return load_rule_base(str(Path(name) / "rule_base.yaml") if is_folder else name)


def _refuse_overwrite(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; commands replace nothing unasked. Name another, or add --overwrite.")
