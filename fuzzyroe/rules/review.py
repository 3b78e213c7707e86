"""The review of a rule base before it is used: what its author left open, contradicted, or left to the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fuzzyroe.rules.completion import Disagreement
from fuzzyroe.rules.rule_base import NO_RULE, FuzzyRuleBase

IDLE = 1.0
"""Effective examples below which a rule keeps its prior and hardly counts."""


@dataclass(frozen=True)
class Review:
    """What a review found.

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
    missing: tuple[tuple[str, ...], ...]
    unused_terms: tuple[tuple[str, str], ...]
    contradictions: tuple[tuple[tuple[str, ...], tuple[str, ...], float], ...]
    fitted_contradictions: tuple[tuple[tuple[str, ...], tuple[str, ...], float], ...]
    undirected: tuple[str, ...]
    disagreements: tuple[Disagreement, ...]
    idle: tuple[tuple[tuple[str, ...], float], ...] | None = None

    @property
    def is_ok(self) -> bool:
        """Whether no rule contradicts the declared directions; gaps are filled by interpolation."""
        return not self.contradictions and not self.fitted_contradictions


def expert_rules(rule_base: FuzzyRuleBase) -> FuzzyRuleBase:
    """Give the rule base with the expert's rules only, before completion and fitting; knots stay where they are.

    Raises:
        ValueError: If no rule is the expert's.
    """
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


def review_rule_base(
    rule_base: FuzzyRuleBase, methods: Sequence[str] = ("scale_and_move", "additive"), tolerance: float = 0.1
) -> Review:
    """Look for gaps, contradictions and conclusions that depend on the completion method.

    Two rules for the same combination of terms never come this far: reading the file refuses them.

    Args:
        rule_base: Sparse, completed or fitted.
        methods: Completion methods to compare, two or more keys of ``interpolation.METHODS``.
        tolerance: Spread between methods that is accepted, as a share of the consequent's universe.

    Returns:
        The findings.
    """
    expert = expert_rules(rule_base)
    unused = tuple(
        (variable.name, term)
        for axis, variable in enumerate(expert.antecedents)
        for index, term in enumerate(variable.terms)
        if np.isnan(np.take(expert.table, index, axis=axis)).all()
    )
    evidence = evidence_of(rule_base)
    idle = None
    if evidence is not None:
        cells = map(tuple, np.argwhere(evidence < IDLE))
        idle = tuple((rule_base.terms_of(cell), float(evidence[cell])) for cell in cells)
    is_same_table = np.array_equal(rule_base.table, expert.table, equal_nan=True)
    is_comparable = not expert.is_complete and not (unused and "additive" in methods)
    return Review(
        num_rules=expert.num_rules,
        num_given=int((expert.source == "expert").sum()),
        missing=tuple(expert.missing_cells()),
        unused_terms=unused,
        contradictions=tuple(expert.monotonicity_violations()),
        fitted_contradictions=() if is_same_table else tuple(rule_base.monotonicity_violations()),
        undirected=tuple(variable.name for variable in expert.antecedents if not variable.sign),
        disagreements=expert.method_disagreements(methods, tolerance) if is_comparable else (),
        idle=idle,
    )
