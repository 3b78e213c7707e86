"""``fuzzyroe rules show``: variables and rules of a rule base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava.cli.rules.source import RuleBaseName, open_rule_base

if TYPE_CHECKING:
    import numpy as np

    from fuzzyroe.rules.rule_base import FuzzyRuleBase

_EMPTY = "–"


def show_command(rule_base: RuleBaseName) -> None:
    """Show variables and rules, with what the expert gave, what was interpolated, what was fitted and to how much."""
    from fuzzyroe.rules.review import evidence_of
    from llava.cli.terminal import make_table, open_console

    rules = open_rule_base(rule_base)
    console = open_console()
    consequent = rules.consequent
    lower, upper = consequent.output_range
    console.print(f"{rules.name}: {rules.description}" if rules.description else rules.name, style="bold", markup=False)
    variables = [
        (
            variable.name,
            ", ".join(f"{term} {peak:.3f}" for term, peak in zip(variable.terms, variable.peaks, strict=True)),
            f"[{variable.universe[0]:g}, {variable.universe[1]:g}]",
            variable.monotone or "unknown",
        )
        for variable in rules.antecedents
    ]
    console.print(
        make_table("\nVariables", ("name", "terms with their peaks", "universe", "effect"), variables, text_columns=4)
    )
    columns = (*(variable.name for variable in rules.antecedents), "expert", "interpolated", "fitted")
    evidence = evidence_of(rules)
    if evidence is not None:
        columns += ("examples",)
    title = f"\nRules for {consequent.name} in [{lower:g}, {upper:g}]"
    console.print(make_table(title, columns, _rows(rules, evidence), text_columns=len(rules.antecedents)))
    if not rules.is_complete:
        console.print(
            f"{len(rules.missing_cells())} of {rules.num_rules} combinations have no rule in the file; the "
            f"interpolated values are what '{rules.interpolation.method}' concludes",
            style="dim",
            soft_wrap=True,
        )


def _rows(rules: FuzzyRuleBase, evidence: np.ndarray | None) -> list[list[str]]:
    """One row per combination of terms; the examples are those that informed the rule in the fit."""
    prior = rules.unfitted()
    completed = prior if prior.is_complete else prior.interpolate()
    rows = []
    for cell in rules.cells():
        origin = completed.source[cell]
        value = f"{completed.output_table[cell]:.3f}"
        fitted = f"{rules.output_table[cell]:.3f}" if rules.source[cell] == "fitted" else _EMPTY
        by_origin = [value if origin == name else _EMPTY for name in ("expert", "interpolated")]
        examples = [] if evidence is None else [f"{evidence[cell]:.1f}"]
        rows.append([*rules.terms_of(cell), *by_origin, fitted, *examples])
    return rows
