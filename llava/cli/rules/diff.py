"""``fuzzyroe rules diff``: what differs between two rule bases."""

from __future__ import annotations

from llava.cli.rules.source import RuleBaseName, open_rule_base


def diff_command(first: RuleBaseName, second: RuleBaseName) -> None:
    """List differing variables, options and rules; names and descriptions do not count."""
    from fuzzyroe.rules.review import compare_rule_bases
    from llava.cli.terminal import make_table, open_console

    rules = open_rule_base(first)
    difference = compare_rule_bases(rules, open_rule_base(second))
    console = open_console()
    if difference.is_empty:
        console.print("no difference")
        return
    for sentence in difference.settings:
        console.print(sentence, markup=False, soft_wrap=True)
    if difference.rules is None:
        console.print("the variables or terms differ, so rules cannot be lined up")
        return
    columns = (*(variable.name for variable in rules.antecedents), first, second, "change", "origin")
    rows = [
        [
            *rule.terms,
            _number(rule.first),
            _number(rule.second),
            "" if None in (rule.first, rule.second) else f"{rule.second - rule.first:+.3f}",
            rule.first_origin
            if rule.first_origin == rule.second_origin
            else f"{rule.first_origin} -> {rule.second_origin}",
        ]
        for rule in difference.rules
    ]
    title = f"\n{len(rows)} of {rules.num_rules} rules differ"
    console.print(make_table(title, columns, rows, text_columns=len(rules.antecedents)))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
