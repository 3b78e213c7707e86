"""The rule base: linguistic variables with a table of consequents, one cell per combination of terms.

``table[i, j, k]`` is the consequent of "antecedent 0 is its term i, antecedent 1 its term j, ...", in units of the
consequent's universe; nan marks a combination without a rule. With product t-norm and partitions that sum to one,
zero-order TSK inference is the multilinear interpolation of this table, so the table *is* the control surface at the
peaks.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fuzzyroe.rules.fitting import (
    PRIOR_STRENGTHS,
    RuleReport,
    effective_examples,
    find_contradictions,
    fit_consequents,
    make_monotone_exactly,
    order_edges,
)
from fuzzyroe.rules.interpolation import InterpolationOptions, complete_table
from fuzzyroe.rules.variable import Consequent, LinguisticVariable, check_identifier

logger = logging.getLogger(__name__)

NO_RULE = "none"
SOURCES = ("expert", "interpolated", "fitted")
_ARRAYS = {"table": "f8", "prior_table": "f8", "source": "U16", "prior_source": "U16"}


@dataclass(frozen=True, eq=False)
class FuzzyRuleBase:
    """An immutable rule base; every method that changes something gives a new one.

    Attributes:
        name: Identifier of the rule base.
        antecedents: The D variables, in the order of the features (K).
        table: Consequents in units of the consequent's universe, nan = no rule, float64 (K_1, ..., K_D).
        source: Origin of each cell, ``"expert"``, ``"interpolated"``, ``"fitted"`` or ``"none"``, (K_1, ..., K_D).
        consequent: Name, universe and output range of the conclusions.
        interpolation: How missing cells are completed by default.
        non_finite: Output for an example with a nan or infinite feature, in output units.
        description: One sentence for readers.
        provenance: How this rule base came about, plain data.
        prior_table: The complete table before fitting, or None; fitting again starts from it.
        prior_source: Origin of its cells.
        comments: Why a rule says what it says, in its author's words, by terms.
    """

    name: str
    antecedents: tuple[LinguisticVariable, ...]
    table: np.ndarray
    source: np.ndarray
    consequent: Consequent
    interpolation: InterpolationOptions = InterpolationOptions()
    non_finite: float = 1.0
    description: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    prior_table: np.ndarray | None = None
    prior_source: np.ndarray | None = None
    comments: Mapping[tuple[str, ...], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # copies, and read-only arrays: nobody changes a rule base behind the back of a router built from it
        object.__setattr__(self, "antecedents", tuple(self.antecedents))
        object.__setattr__(self, "provenance", copy.deepcopy(dict(self.provenance)))
        object.__setattr__(self, "comments", {terms: " ".join(text.split()) for terms, text in self.comments.items()})
        for key, dtype in _ARRAYS.items():
            if getattr(self, key) is not None:
                array = np.array(getattr(self, key), dtype=dtype)
                array.setflags(write=False)
                object.__setattr__(self, key, array)
        check_identifier(self.name, "The name of a rule base")
        problem = self._find_problem()
        if problem:
            raise ValueError(f"Rule base '{self.name}' has {problem}")

    def _find_problem(self) -> str | None:
        """Say what is inconsistent, what is allowed, and what to do."""
        names = [variable.name for variable in self.antecedents] + [self.consequent.name]
        if len(names) < 2 or len(set(names)) < len(names):
            return (
                f"the variables {names}; one or more antecedents and a consequent with different names are allowed; "
                "rename or add one."
            )
        if not np.isfinite(self.non_finite):
            return f"non_finite {self.non_finite}; a finite number is allowed; use 1.0 to run every layer."
        if {self.prior_table is None, self.prior_source is None} != {"fitted" not in self.source}:
            return (
                "fitted cells without prior_table and prior_source, or the reverse; fitted cells need the values they "
                "were fitted from; pass both or neither."
            )
        for table, source in ((self.table, self.source), (self.prior_table, self.prior_source)):
            if table is None or source is None:
                continue
            if table.shape != self.shape or source.shape != self.shape:
                return (
                    f"a table {table.shape} and sources {source.shape}; {self.shape} (terms per antecedent) is "
                    "allowed; pass one cell per combination of terms."
                )
            has_rule = ~np.isnan(table)
            if not has_rule.any():
                return "no rule at all; at least one is needed; add rules."
            if not np.isin(source[has_rule], SOURCES).all() or not (source[~has_rule] == NO_RULE).all():
                return (
                    f"the sources {sorted(set(source.ravel().tolist()))}; {SOURCES} for rules and '{NO_RULE}' for "
                    "empty cells are allowed; correct the sources."
                )
            outside = [value for value in table[has_rule].tolist() if not self.consequent.contains(value)]
            if outside:
                return (
                    f"the consequent {outside[0]}; values in {list(self.consequent.universe)} are allowed; correct the "
                    "rule or widen the universe."
                )
        return None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FuzzyRuleBase):
            return NotImplemented
        # dataclass equality compares arrays element by element and cannot decide
        return all(_equal(getattr(self, key), getattr(other, key)) for key in self.__dataclass_fields__)

    @classmethod
    def from_rules(
        cls,
        name: str,
        antecedents: Sequence[LinguisticVariable],
        consequent: Consequent,
        rules: Mapping[tuple[str, ...], float],
        **options: Any,
    ) -> FuzzyRuleBase:
        """Make a rule base from expert rules: a consequent per tuple of D terms; ``options`` are further attributes.

        Raises:
            ValueError: If a rule has the wrong number of terms or an unknown one.
        """
        shape = tuple(len(variable.terms) for variable in antecedents)
        # U16: with the width of "none", numpy would cut "expert" short
        table, source = np.full(shape, np.nan), np.full(shape, NO_RULE, dtype="U16")
        known = [variable.terms for variable in antecedents]
        for terms, value in rules.items():
            if len(terms) != len(known) or any(term not in names for term, names in zip(terms, known, strict=True)):
                raise ValueError(f"The rule {terms} is not one term of each of {known}; correct its terms.")
            cell = tuple(names.index(term) for term, names in zip(terms, known, strict=True))
            table[cell], source[cell] = value, "expert"
        return cls(name, tuple(antecedents), table, source, consequent, **options)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of terms per antecedent."""
        return tuple(len(variable.terms) for variable in self.antecedents)

    @property
    def num_rules(self) -> int:
        """Number of cells R of the table, with or without a rule."""
        return self.table.size

    @property
    def is_complete(self) -> bool:
        """Whether every combination of terms has a rule."""
        return not np.isnan(self.table).any()

    @property
    def output_table(self) -> np.ndarray:
        """The table in output units, (K_1, ..., K_D)."""
        return self.consequent.to_output(self.table)

    @property
    def signs(self) -> np.ndarray:
        """Declared direction of each antecedent: 1, -1, or 0 for unknown, (D,)."""
        return np.array([variable.sign for variable in self.antecedents])

    def terms_of(self, cell: Sequence[int]) -> tuple[str, ...]:
        """Name the terms of a cell."""
        return tuple(variable.terms[k] for variable, k in zip(self.antecedents, cell, strict=True))

    def cells(self) -> list[tuple[int, ...]]:
        """List all cells in row-major order, the order of firing strengths."""
        return list(itertools.product(*map(range, self.shape)))

    def missing_cells(self) -> list[tuple[str, ...]]:
        """List the combinations of terms without a rule."""
        return [self.terms_of(cell) for cell in np.argwhere(np.isnan(self.table)).tolist()]

    def monotonicity_violations(self, tolerance: float = 1e-9) -> list[tuple[tuple[str, ...], tuple[str, ...], float]]:
        """List pairs of given rules, neighbours or not, that contradict the declared directions.

        Args:
            tolerance: Violations up to this size, in units of the consequent's universe, are rounding.

        Returns:
            The cell that should not be larger, the cell that should not be smaller, and the excess.
        """
        pairs = find_contradictions(self.table, self.signs, tolerance)
        return [(self.terms_of(lower), self.terms_of(upper), excess) for lower, upper, excess in pairs]

    def firing_strengths(self, points: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """Fire all cells in double precision (the torch module does the same on devices).

        Returns:
            Products of memberships, rows sum to one, (n, R), of finite feature vectors, (n, D).
        """
        points = np.asarray(points, dtype=np.float64)
        self._check_columns(points)
        firing = np.ones((len(points), 1))
        # the outer product over the antecedents, one at a time, in the row-major order of the table
        for column, variable in zip(points.T, self.antecedents, strict=True):
            firing = (firing[:, :, None] * variable.memberships(column)[:, None, :]).reshape(len(points), -1)  # (n, R)
        return firing

    def evaluate(self, points: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """Infer outputs, (n,), of finite feature vectors, (n, D), in double precision.

        >>> from fuzzyroe.rules import load_rule_base
        >>> rule_base = load_rule_base("default").interpolate()
        >>> rule_base.evaluate([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]).round(3).tolist()
        [0.0, 0.333, 1.0]
        """
        self._require_complete("evaluate")
        return self.firing_strengths(points) @ self.output_table.ravel()

    def interpolate(self, method: str | None = None, **options: Any) -> FuzzyRuleBase:
        """Complete the missing cells by fuzzy rule interpolation; given cells keep every bit.

        >>> from fuzzyroe.rules import load_rule_base
        >>> completed = load_rule_base("default").interpolate()
        >>> completed.is_complete, round(float(completed.table[0, 0, 1]), 3)  # low, low, medium
        (True, 0.111)

        Args:
            method: A key of ``interpolation.METHODS``; None for the rule base's own.
            **options: ``selection``, ``fallback``, ``monotone``, see ``InterpolationOptions``.
        """
        options |= {} if method is None else {"method": method}
        chosen = replace(self.interpolation, **options)
        conflicts = self.monotonicity_violations() if chosen.monotone else []
        if conflicts:  # the author decides: given rules stay as they are, and the projection works around them
            logger.warning("Rule base '%s': given rules contradict its directions: %s", self.name, conflicts)
        if int((~np.isnan(self.table)).sum()) == 1:
            logger.warning("Rule base '%s' has a single rule, so its output hardly depends on the features.", self.name)
        source = np.where(np.isnan(self.table), "interpolated", self.source)
        return replace(self, table=self.complete_table(chosen), source=source, interpolation=chosen)

    def complete_table(self, options: InterpolationOptions) -> np.ndarray:
        """Give the table that ``interpolate`` would, without a word on contradictions, (K_1, ..., K_D)."""
        term_sets = [variable.fuzzy_sets() for variable in self.antecedents]
        ranges = np.ptp([variable.universe for variable in self.antecedents], axis=1)
        return complete_table(self.table, term_sets, ranges, self.signs, options)

    def fit(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        *,
        prior_strength: float | Mapping[str, float] = PRIOR_STRENGTHS,
        monotone: bool = True,
        max_change: float | None = None,
    ) -> FuzzyRuleBase:
        """Fit the consequents to examples, see ``fitting.fit_consequents``; a fitted one starts from its prior again.

        Args:
            features: Feature vectors, finite, (n, D).
            targets: What the rules should give, in output units, (n,); may leave the output range.
            prior_strength: Pseudo-examples per rule, a number or one per source (expert, interpolated).
            monotone: Whether the declared directions are imposed.
            max_change: Largest allowed change of a rule in output units; None for any.
        """
        self._require_complete("fit")
        prior = self.unfitted()  # no example counts twice
        firing = self.firing_strengths(features)
        signs = self.signs if monotone else np.zeros(len(self.antecedents), dtype=np.int64)
        lower, upper = self.consequent.output_range
        fitted = fit_consequents(
            firing,
            targets,
            prior.output_table.ravel(),
            prior_strength=_strengths(prior.source.ravel().tolist(), prior_strength),
            edges=order_edges(self.shape, signs),
            lower=lower,
            upper=upper,
            max_change=max_change,
        )
        record = {
            "examples": len(firing),
            "prior_strength": dict(prior_strength) if isinstance(prior_strength, Mapping) else prior_strength,
            "monotone": monotone,
            "max_change": max_change,
            "effective_examples": effective_examples(firing).round(2).tolist(),
            "root_mean_square_error": float(np.sqrt(np.mean(np.square(firing @ fitted - targets)))),
        }
        return replace(
            prior,
            # the fit is monotone up to rounding; in units of the universe it then is exactly
            table=make_monotone_exactly(self.consequent.from_output(fitted.reshape(self.shape)), signs),
            source=np.full(self.shape, "fitted"),
            prior_table=prior.table,
            prior_source=prior.source,
            provenance={**self.provenance, "fit": record},
        )

    def unfitted(self) -> FuzzyRuleBase:
        """Give the rule base as it was before fitting; an unfitted one is returned as it is."""
        if self.prior_table is None or self.prior_source is None:
            return self
        return replace(self, table=self.prior_table, source=self.prior_source, prior_table=None, prior_source=None)

    def report(self, features: np.ndarray) -> tuple[RuleReport, ...]:
        """Say for each cell what the expert gave, what was fitted, and on how many of the examples, (n, D)."""
        prior = self.unfitted()
        counts = effective_examples(self.firing_strengths(features)).tolist()
        entries = []
        for cell, count in zip(self.cells(), counts, strict=True):
            source, before, after = prior.source[cell], float(prior.output_table[cell]), float(self.output_table[cell])
            expert, interpolated = (before if source == origin else None for origin in ("expert", "interpolated"))
            entries.append(RuleReport(self.terms_of(cell), expert, interpolated, after, count, after - before))
        return tuple(entries)

    def with_knots(self, peaks: Sequence[Sequence[float]]) -> FuzzyRuleBase:
        """Move the peaks, K_j for each of the D antecedents; the consequents stay with their terms."""
        pairs = zip(self.antecedents, peaks, strict=True)
        return replace(self, antecedents=tuple(replace(variable, peaks=tuple(new)) for variable, new in pairs))

    def with_quantile_knots(self, features: np.ndarray) -> FuzzyRuleBase:
        """Move the peaks to the ``(k + 1/2) / K`` quantiles of observed features, (n, D); no targets are needed."""
        self._check_columns(features)
        moved = [
            LinguisticVariable.from_quantiles(v.name, column, v.terms, v.universe, v.monotone).peaks
            for v, column in zip(self.antecedents, features.T, strict=True)
        ]
        return replace(self.with_knots(moved), provenance={**self.provenance, "knots": {"examples": len(features)}})

    def flip_direction(self, signs: Sequence[int]) -> FuzzyRuleBase:
        """Flip the table along the antecedents that act the other way than the rules declare.

        The consequents of the lowest and the highest term are exchanged, and so on inwards, and so is the declared
        direction; terms and peaks stay. If any antecedent is flipped, comments are dropped: they argue for the
        opposite.

        Args:
            signs: 1 (as written) or -1 (flip) per antecedent, (D,).
        """
        if len(signs) != len(self.antecedents) or any(sign not in (1, -1) for sign in signs):
            raise ValueError(
                f"signs is {list(signs)}; 1 or -1 for each of the {len(self.antecedents)} antecedents is allowed; "
                "pass 1 where nothing changes."
            )
        axes = tuple(axis for axis, sign in enumerate(signs) if sign < 0)
        # rules flip with the declared direction, so that they go on agreeing with it
        variables = [v.flip_direction() if axis in axes else v for axis, v in enumerate(self.antecedents)]
        arrays = {key: np.flip(getattr(self, key), axes) for key in _ARRAYS if getattr(self, key) is not None}
        kept = {key: value for key, value in self.provenance.items() if key != "fit"}  # its examples fired other cells
        comments = {} if axes else self.comments
        return replace(self, antecedents=tuple(variables), provenance=kept, comments=comments, **arrays)

    def _check_columns(self, points: np.ndarray) -> None:
        if points.ndim != 2 or points.shape[1] != len(self.antecedents) or not np.isfinite(points).all():
            raise ValueError(
                f"The points have shape {points.shape}; finite ones of shape (n, {len(self.antecedents)}) are "
                "allowed; pass one column per antecedent and drop non-finite rows."
            )

    def _require_complete(self, purpose: str) -> None:
        if not self.is_complete:
            raise ValueError(
                f"Rule base '{self.name}' has no rule for {self.missing_cells()}, but to {purpose} it every "
                "combination needs one; call interpolate() first."
            )


def _strengths(sources: Sequence[str], strength: float | Mapping[str, float]) -> np.ndarray:
    """Give each rule the strength of its prior, by its origin if strengths are given by origin, (R,)."""
    strengths = strength if isinstance(strength, Mapping) else dict.fromkeys(sources, strength)
    unknown = set(sources) - set(strengths)
    if unknown:
        raise KeyError(
            f"No prior strength for rules of origin {sorted(unknown)}; known: {sorted(strengths)}; add them."
        )
    return np.array([float(strengths[source]) for source in sources])


def _equal(first: Any, second: Any) -> bool:
    """Compare attributes bit for bit, nan being equal to nan."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    return type(first) is type(second) and bool(first == second)
