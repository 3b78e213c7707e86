"""Explanations of a score, reviews of a rule base, and the differences between two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuzzyroe.rules.interpolation import InterpolationOptions
from fuzzyroe.rules.rule_base import NO_RULE, FuzzyRuleBase

CERTAIN, MOSTLY = 0.995, 0.7
"""From these memberships on a value simply *is* the term, or *mostly* is; below, it lies between two terms."""

FIRED = 1e-3
"""From this strength on a rule counts as fired; weaker ones change the score by less than it shows."""

IDLE = 1.0
"""Effective examples below which a rule keeps its prior and hardly counts."""

Terms = tuple[str, ...]


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
    terms: Terms
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
    order = np.argsort(-strengths, kind="stable")[: min(max_rules, num_fired)].tolist()
    fired = tuple(_fired_rule(rule_base, rule_base.cells()[index], float(strengths[index])) for index in order)
    return Explanation(values, memberships, words, fired, num_fired, float(rule_base.evaluate(point)[0]))


def _fired_rule(rule_base: FuzzyRuleBase, cell: tuple[int, ...], strength: float) -> FiredRule:
    terms, output = rule_base.terms_of(cell), float(rule_base.output_table[cell])
    pairs = zip(rule_base.antecedents, terms, strict=True)
    condition = " and ".join(f"{variable.name} is {term}" for variable, term in pairs)
    text = f"if {condition} then {rule_base.consequent.name} is {output:.2f}"
    return FiredRule(text, terms, strength, output, origin_of(rule_base, cell), rule_base.comments.get(terms, ""))


def describe_memberships(degrees: Mapping[str, float]) -> str:
    """Put the memberships of one value into words, of which at most two neighbours are above zero.

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


def origin_of(rule_base: FuzzyRuleBase, cell: Sequence[int]) -> str:
    """Say where the consequent of a cell comes from: its author, and whether calibration has moved it."""
    before, now = (str(base.source[tuple(cell)]) for base in (rule_base.unfitted(), rule_base))
    return now if before == now else f"{before}, {now}"


def expert_rules(rule_base: FuzzyRuleBase) -> FuzzyRuleBase:
    """Give the rule base with the expert's rules only, before completion and fitting; knots stay where they are.

    Raises:
        ValueError: If no rule is the expert's.
    """
    # fitting keeps the origins of its prior, completion marks what it adds: both can be undone
    prior = rule_base.unfitted()
    is_expert = prior.source == "expert"
    if not is_expert.any():
        raise ValueError(
            f"Rule base '{rule_base.name}' holds no rule of an expert; at least one is needed; mark the origin of its "
            "rules."
        )
    return replace(prior, table=np.where(is_expert, prior.table, np.nan), source=np.where(is_expert, "expert", NO_RULE))


def evidence_of(rule_base: FuzzyRuleBase) -> np.ndarray | None:
    """Give the effective examples of each rule in the fit, (K_1, ..., K_D); None if it was not fitted."""
    counts = rule_base.provenance.get("fit", {}).get("effective_examples")
    return None if counts is None or rule_base.prior_table is None else np.reshape(counts, rule_base.shape)


@dataclass(frozen=True)
class Disagreement:
    """A missing cell on which completion methods differ.

    Attributes:
        terms: Terms of the cell.
        values: Conclusion of each method, in units of the consequent's universe.
        spread: Largest minus smallest conclusion, as a share of that universe.
    """

    terms: Terms
    values: dict[str, float]
    spread: float


@dataclass(frozen=True)
class Review:
    """The findings of a review.

    Attributes:
        num_rules: Combinations of terms.
        num_given: Of these, with a rule of the expert.
        missing: The others.
        unused_terms: Terms that no rule of the expert names, ``(variable, term)``.
        contradictions: Pairs of expert rules against the declared directions: the cell that should not be larger, the
            one that should not be smaller, and the excess in units of the consequent's universe.
        fitted_contradictions: The same for the table in use, where it has been completed or fitted.
        undirected: Variables without a declared direction.
        disagreements: Missing cells on which completion methods differ.
        idle: Rules that fewer than ``IDLE`` examples of the fit informed, with that number; None before a fit.
    """

    num_rules: int
    num_given: int
    missing: tuple[Terms, ...]
    unused_terms: tuple[tuple[str, str], ...]
    contradictions: tuple[tuple[Terms, Terms, float], ...]
    fitted_contradictions: tuple[tuple[Terms, Terms, float], ...]
    undirected: tuple[str, ...]
    disagreements: tuple[Disagreement, ...]
    idle: tuple[tuple[Terms, float], ...] | None = None

    @property
    def is_ok(self) -> bool:
        """Whether no rule contradicts the declared directions; gaps are filled by interpolation."""
        return not self.contradictions and not self.fitted_contradictions


def review_rule_base(
    rule_base: FuzzyRuleBase, methods: Sequence[str] = ("scale_and_move", "additive"), tolerance: float = 0.1
) -> Review:
    """Look for gaps, contradictions and conclusions that depend on the completion method.

    Two rules for the same combination of terms never come this far: reading the file refuses them.

    Args:
        rule_base: Sparse, completed or fitted.
        methods: Completion methods to compare, two or more keys of ``interpolation.METHODS``.
        tolerance: Spread between methods that is accepted, as a share of the consequent's universe.
    """
    expert = expert_rules(rule_base)
    unused = tuple(
        (variable.name, term)
        for axis, variable in enumerate(expert.antecedents)
        for index, term in enumerate(variable.terms)
        if np.isnan(np.take(expert.table, index, axis=axis)).all()
    )
    evidence, idle = evidence_of(rule_base), None
    if evidence is not None:
        idle = tuple((rule_base.terms_of(c), float(evidence[c])) for c in rule_base.cells() if evidence[c] < IDLE)
    is_as_written = np.array_equal(rule_base.table, expert.table, equal_nan=True)
    # additive completion needs a rule for every term, so there is nothing to compare it with
    is_comparable = not expert.is_complete and not (unused and "additive" in methods)
    return Review(
        num_rules=expert.num_rules,
        num_given=int((expert.source == "expert").sum()),
        missing=tuple(expert.missing_cells()),
        unused_terms=unused,
        contradictions=tuple(expert.monotonicity_violations()),
        fitted_contradictions=() if is_as_written else tuple(rule_base.monotonicity_violations()),
        undirected=tuple(variable.name for variable in expert.antecedents if not variable.sign),
        disagreements=find_disagreements(expert, methods, tolerance) if is_comparable else (),
        idle=idle,
    )


def find_disagreements(
    rule_base: FuzzyRuleBase, methods: Sequence[str] = ("scale_and_move", "additive"), tolerance: float = 0.1
) -> tuple[Disagreement, ...]:
    """List the missing cells of a sparse rule base on which completion methods differ, the largest spread first.

    Arguments as for ``review_rule_base``; each method with its default selection.
    """
    tables = {method: rule_base.complete_table(InterpolationOptions(method)) for method in methods}
    lower, upper = rule_base.consequent.universe
    disagreements = []
    for cell in rule_base.cells():
        values = {method: float(table[cell]) for method, table in tables.items()}
        # given cells keep every bit whatever the method, so their spread is zero
        spread = (max(values.values()) - min(values.values())) / (upper - lower)
        if spread > tolerance:
            disagreements.append(Disagreement(rule_base.terms_of(cell), values, spread))
    return tuple(sorted(disagreements, key=lambda item: -item.spread))


@dataclass(frozen=True)
class RuleDifference:
    """One combination of terms on which two rule bases differ.

    Attributes:
        terms: The combination.
        first, second: Consequents in output units; None where there is no rule.
        first_origin, second_origin: Where they come from.
    """

    terms: Terms
    first: float | None
    second: float | None
    first_origin: str
    second_origin: str


@dataclass(frozen=True)
class Difference:
    """Variables, options and rules in which two rule bases differ.

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

    Differences of consequents and peaks up to the tolerance are rounding.
    """
    settings = _compare_variables(first, second, tolerance)
    for name in ("consequent", "interpolation", "non_finite"):
        if getattr(first, name) != getattr(second, name):
            settings.append(f"{name}: {getattr(first, name)} -> {getattr(second, name)}")
    terms = [[(variable.name, variable.terms) for variable in rules.antecedents] for rules in (first, second)]
    if terms[0] != terms[1]:  # a cell of one is no cell of the other
        return Difference(tuple(settings), None)
    differences = []
    for cell in first.cells():
        values = [float(rules.output_table[cell]) for rules in (first, second)]
        origins = origin_of(first, cell), origin_of(second, cell)
        # nan, no rule, equals itself here
        is_same = np.isclose(values[0], values[1], rtol=0, atol=tolerance, equal_nan=True)
        if not is_same or origins[0] != origins[1]:
            one, other = (None if np.isnan(value) else value for value in values)
            differences.append(RuleDifference(first.terms_of(cell), one, other, *origins))
    return Difference(tuple(settings), tuple(differences))


def _compare_variables(first: FuzzyRuleBase, second: FuzzyRuleBase, tolerance: float) -> list[str]:
    names = [", ".join(variable.name for variable in rules.antecedents) for rules in (first, second)]
    if names[0] != names[1]:
        return [f"antecedents: {names[0]} -> {names[1]}"]
    sentences = []
    for one, other in zip(first.antecedents, second.antecedents, strict=True):
        if one.terms != other.terms:
            sentences.append(f"{one.name}: terms {', '.join(one.terms)} -> {', '.join(other.terms)}")
        elif not np.allclose(one.peaks, other.peaks, rtol=0, atol=tolerance):
            before, after = (", ".join(f"{peak:.3f}" for peak in variable.peaks) for variable in (one, other))
            sentences.append(f"{one.name}: peaks {before} -> {after}")
        if one.universe != other.universe:
            sentences.append(f"{one.name}: universe {list(one.universe)} -> {list(other.universe)}")
        if one.monotone != other.monotone:
            sentences.append(f"{one.name}: direction {one.monotone or 'unknown'} -> {other.monotone or 'unknown'}")
    return sentences
