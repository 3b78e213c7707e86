"""The difference of two rule bases, variable by variable, then rule by rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fuzzyroe.rules.explain import origin_of
from fuzzyroe.rules.rule_base import FuzzyRuleBase


@dataclass(frozen=True)
class RuleDifference:
    """One combination of terms on which two rule bases differ.

    Attributes:
        terms: The combination.
        first, second: Consequents in output units; None where there is no rule.
        first_origin, second_origin: Where they come from.
    """

    terms: tuple[str, ...]
    first: float | None
    second: float | None
    first_origin: str
    second_origin: str


@dataclass(frozen=True)
class Difference:
    """What differs between two rule bases.

    Attributes:
        settings: One sentence per differing variable, consequent or option.
        rules: Differing rules in row-major order; None where the terms differ, so that rules cannot be lined up.
    """

    settings: tuple[str, ...]
    rules: tuple[RuleDifference, ...] | None

    @property
    def is_empty(self) -> bool:
        """Whether both rule bases infer the same from the same rules."""
        return not self.settings and self.rules == ()


def compare_rule_bases(first: FuzzyRuleBase, second: FuzzyRuleBase, tolerance: float = 1e-9) -> Difference:
    """List what differs; names, descriptions and provenance do not count.

    Args:
        first: A rule base.
        second: Another one.
        tolerance: Differences of consequents and peaks up to this size are rounding.
    """
    settings = [*_compare_variables(first, second, tolerance), *_compare_options(first, second)]
    terms = [[(v.name, v.terms) for v in rule_base.antecedents] for rule_base in (first, second)]
    if terms[0] != terms[1]:
        return Difference(tuple(settings), None)
    rules = []
    for cell in first.cells():
        values = [_value(rule_base, cell) for rule_base in (first, second)]
        origins = [origin_of(rule_base, cell) for rule_base in (first, second)]
        is_same = values[0] == values[1] or (None not in values and abs(values[0] - values[1]) <= tolerance)
        if not is_same or origins[0] != origins[1]:
            rules.append(RuleDifference(first.terms_of(cell), *values, *origins))
    return Difference(tuple(settings), tuple(rules))


def _value(rule_base: FuzzyRuleBase, cell: tuple[int, ...]) -> float | None:
    value = float(rule_base.output_table[cell])
    return None if np.isnan(value) else value


def _compare_variables(first: FuzzyRuleBase, second: FuzzyRuleBase, tolerance: float) -> list[str]:
    names = [[variable.name for variable in rule_base.antecedents] for rule_base in (first, second)]
    if names[0] != names[1]:
        return [f"antecedents: {', '.join(names[0])} -> {', '.join(names[1])}"]
    found = []
    for one, other in zip(first.antecedents, second.antecedents, strict=True):
        if one.terms != other.terms:
            found.append(f"{one.name}: terms {', '.join(one.terms)} -> {', '.join(other.terms)}")
        elif not np.allclose(one.peaks, other.peaks, rtol=0, atol=tolerance):
            before, after = (", ".join(f"{peak:.3f}" for peak in variable.peaks) for variable in (one, other))
            found.append(f"{one.name}: peaks {before} -> {after}")
        if one.universe != other.universe:
            found.append(f"{one.name}: universe {list(one.universe)} -> {list(other.universe)}")
        if one.monotone != other.monotone:
            found.append(f"{one.name}: direction {one.monotone or 'unknown'} -> {other.monotone or 'unknown'}")
    return found


def _compare_options(first: FuzzyRuleBase, second: FuzzyRuleBase) -> list[str]:
    return [
        f"{name}: {getattr(first, name)} -> {getattr(second, name)}"
        for name in ("consequent", "interpolation", "non_finite")
        if getattr(first, name) != getattr(second, name)
    ]
