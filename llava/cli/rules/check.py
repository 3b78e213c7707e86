"""``fuzzyroe rules check``: gaps, contradictions and doubtful conclusions of a rule base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llava.cli.rules.source import RuleBaseName, open_rule_base
from llava.cli.terminal import USER_ERROR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fuzzyroe.rules.review import Review


def check_command(
    rule_base: RuleBaseName,
    tolerance: Annotated[
        float, typer.Option(help="Accepted spread of completion methods, share of the universe.", min=0, max=1)
    ] = 0.1,
) -> None:
    """Check coverage, directions, conflicts and completion; exit 2 if rules contradict each other."""
    from fuzzyroe.rules.review import review_rule_base
    from llava.cli.terminal import open_console

    rules = open_rule_base(rule_base)  # refuses two rules for one combination of terms
    review = review_rule_base(rules, tolerance=tolerance)
    console = open_console()
    for line in _lines(review, tolerance):
        console.print(line, markup=False, soft_wrap=True)
    if not review.is_ok:
        raise typer.Exit(USER_ERROR)


def _lines(review: Review, tolerance: float) -> Iterator[str]:
    share = review.num_given / review.num_rules
    yield f"coverage: the expert gives {review.num_given} of {review.num_rules} rules ({share:.0%})"
    for terms in review.missing:
        yield f"  to be interpolated: {', '.join(terms)}"
    yield "conflicts: none, every combination of terms has at most one rule"
    for heading, found in (
        ("directions, expert rules", review.contradictions),
        ("directions, rules in use", review.fitted_contradictions),
    ):
        yield f"{heading}: {len(found) or 'no'} contradiction{'' if len(found) == 1 else 's'}"
        for lower, upper, excess in found:
            yield f"  ({', '.join(lower)}) concludes {excess:.3f} more than ({', '.join(upper)}) and should not"
    for variable in review.undirected:
        yield f"  {variable} has no declared direction, so it is not checked"
    yield from _unused(review)
    if not review.missing:
        yield "completion: nothing to complete"
    else:
        number = len(review.disagreements)
        yield f"completion: methods differ by more than {tolerance:.0%} of the universe on {number or 'no'} rules"
    for item in review.disagreements:
        values = ", ".join(f"{method} {value:.3f}" for method, value in item.values.items())
        yield f"  {', '.join(item.terms)}: {values}; consider giving this rule yourself"


def _unused(review: Review) -> Iterator[str]:
    """What the rule base holds for nothing: terms without a rule of the expert, rules that hardly any example fired."""
    yield f"unused terms: {len(review.unused_terms) or 'none'}"
    for variable, term in review.unused_terms:
        yield f"  no rule of the expert mentions {variable} = {term}"
    if review.idle is None:
        yield "unused rules: unknown, these rules were not fitted to examples yet"
        return
    yield f"unused rules: {len(review.idle) or 'none'}"
    for terms, examples in review.idle:
        yield f"  {', '.join(terms)}: informed by {examples:.2f} examples of the fit; its prior and neighbours decide"
