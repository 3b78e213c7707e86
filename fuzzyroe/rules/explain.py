"""Explanations of one feature vector: memberships in words, the rules that fired, the score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fuzzyroe.rules.rule_base import FuzzyRuleBase

CERTAIN = 0.995
"""From this membership on a value simply *is* the term."""

MOSTLY = 0.7
"""From this membership on a value is *mostly* the term; below, it lies between two terms."""

FIRED = 1e-3
"""From this strength on a rule counts as fired; weaker ones change the score by less than it shows."""


@dataclass(frozen=True)
class FiredRule:
    """One rule that fired.

    Attributes:
        text: The rule as a sentence.
        terms: Its terms, in the order of the antecedents.
        strength: Firing strength in [0, 1]; strengths of all rules sum to one.
        output: What it concludes, in output units.
        origin: ``"expert"`` or ``"interpolated"``, followed by ``", fitted"`` where calibration has moved it.
        comment: Why its author wrote it; empty if nothing was said.
    """

    text: str
    terms: tuple[str, ...]
    strength: float
    output: float
    origin: str
    comment: str = ""


@dataclass(frozen=True)
class Explanation:
    """The way from one feature vector to its score.

    Attributes:
        features: Value of each antecedent.
        memberships: Membership in [0, 1] of each term, per antecedent; empty for a non-finite value.
        words: The memberships in words, per antecedent.
        fired: The strongest rules, strongest first; empty if a feature is not finite.
        num_fired: Number of rules with a strength of at least ``FIRED``.
        score: The output, in output units.
    """

    features: dict[str, float]
    memberships: dict[str, dict[str, float]]
    words: dict[str, str]
    fired: tuple[FiredRule, ...]
    num_fired: int
    score: float


def explain_features(rule_base: FuzzyRuleBase, features: Sequence[float], max_rules: int = 5) -> Explanation:
    """Say which rules decide the score of one feature vector.

    Args:
        rule_base: A complete rule base.
        features: One value per antecedent, in their order, (K,).
        max_rules: How many of the fired rules to list.

    Returns:
        The explanation; ``score`` is the sum of strength times output over *all* rules. A non-finite feature fires no
        rule, its score is the rule base's ``non_finite``.

    Raises:
        ValueError: If the rule base is incomplete, or there is not one value per antecedent.
    """
    names = [variable.name for variable in rule_base.antecedents]
    if len(features) != len(names):
        raise ValueError(
            f"{len(features)} features were given; rule base '{rule_base.name}' takes {len(names)}: "
            f"{', '.join(names)}. Give one value for each."
        )
    values = {name: float(value) for name, value in zip(names, features, strict=True)}
    memberships: dict[str, dict[str, float]] = {name: {} for name in names}
    for variable in rule_base.antecedents:
        if math.isfinite(values[variable.name]):
            degrees = variable.memberships(values[variable.name]).tolist()
            memberships[variable.name] = dict(zip(variable.terms, degrees, strict=True))
    words = {name: describe_memberships(degrees) for name, degrees in memberships.items()}
    if not all(map(math.isfinite, values.values())):  # as the router does: no rule fires, every layer runs
        return Explanation(values, memberships, words, (), 0, rule_base.non_finite)
    point = np.array([list(values.values())])
    strengths = rule_base.firing_strengths(point)[0]  # (R,)
    num_fired = int((strengths >= FIRED).sum())
    # stable: of equally strong rules the first in the order of the table
    order = np.argsort(-strengths, kind="stable")[: min(max_rules, num_fired)]
    fired = tuple(_fired_rule(rule_base, int(index), float(strengths[index])) for index in order)
    return Explanation(values, memberships, words, fired, num_fired, float(rule_base.evaluate(point)[0]))


def describe_memberships(degrees: Mapping[str, float]) -> str:
    """Put the memberships of one value into words.

    Args:
        degrees: Membership in [0, 1] of each term; at most two neighbours are above zero.

    Returns:
        For instance ``"high"``, ``"mostly high (0.81), a little medium (0.19)"`` or ``"between low (0.45) and medium
        (0.55)"``; ``"not a finite number"`` without memberships.
    """
    if not degrees:
        return "not a finite number"
    # memberships sum to one and only neighbours overlap, so one or two terms are present
    present = {term: degree for term, degree in degrees.items() if degree > 0}
    first, *others = sorted(present, key=lambda term: -present[term])
    if present[first] >= CERTAIN or not others:
        return first
    if present[first] >= MOSTLY:
        return f"mostly {first} ({present[first]:.2f}), a little {others[0]} ({present[others[0]]:.2f})"
    lower, upper = (term for term in present if term in (first, others[0]))
    return f"between {lower} ({present[lower]:.2f}) and {upper} ({present[upper]:.2f})"


def describe_rule(rule_base: FuzzyRuleBase, terms: Sequence[str], output: float) -> str:
    """Write one rule as a sentence.

    Args:
        rule_base: Gives the names of antecedents and consequent.
        terms: One term per antecedent.
        output: What the rule concludes, in output units.
    """
    pairs = zip(rule_base.antecedents, terms, strict=True)
    condition = " and ".join(f"{variable.name} is {term}" for variable, term in pairs)
    return f"if {condition} then {rule_base.consequent.name} is {output:.2f}"


def origin_of(rule_base: FuzzyRuleBase, cell: Sequence[int]) -> str:
    """Say where the consequent of a cell comes from: its author, and whether calibration has moved it."""
    before, now = (str(base.source[tuple(cell)]) for base in (rule_base.unfitted(), rule_base))
    return now if before == now else f"{before}, {now}"


def _fired_rule(rule_base: FuzzyRuleBase, index: int, strength: float) -> FiredRule:
    cell = rule_base.cells()[index]
    terms, output = rule_base.terms_of(cell), float(rule_base.output_table[cell])
    text, comment = describe_rule(rule_base, terms, output), rule_base.comments.get(terms, "")
    return FiredRule(text, terms, strength, output, origin_of(rule_base, cell), comment)
