"""Variables of a rule base: features with named terms, and the consequent that the rules conclude.

The terms of a feature form a Ruspini partition: each is a triangle that peaks at its own knot and falls to zero at its
neighbours' knots; the first and the last term continue as shoulders. The partition is therefore fixed by its peaks
alone, covers every value, has no gaps, and its memberships sum to one.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

logger = logging.getLogger(__name__)

MIN_SPACING = 1e-3  # smallest distance of two peaks, as a share of the universe
THREE_TERMS = ("low", "medium", "high")
ANY_TERM = "any"  # "don't care" in a rule, hence no name for a term
DIRECTIONS = {"increasing": 1, "decreasing": -1, None: 0}

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPPOSITE = {"increasing": "decreasing", "decreasing": "increasing", None: None}


def check_identifier(name: object, what: str) -> None:
    """Refuse a name that scikit-fuzzy, FCL or MATLAB could not carry, with a ``ValueError``."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} is not an identifier; letters, digits and underscores are allowed, not starting with a "
            "digit; rename it."
        )


def check_interval(interval: Sequence[float], what: str) -> tuple[float, float]:
    """Give an interval as two floats; refuse other than two finite, increasing ones with a ``ValueError``."""
    if len(interval) != 2 or not all(map(math.isfinite, interval)) or interval[0] >= interval[1]:
        raise ValueError(
            f"{what} is {list(interval)}; two finite numbers [lower, upper] with lower < upper are allowed; correct it."
        )
    return float(interval[0]), float(interval[1])


@dataclass(frozen=True)
class LinguisticVariable:
    """A named feature with ordered terms.

    Attributes:
        name: Identifier of the feature.
        universe: Smallest and largest value of the feature; values outside act like the border.
        terms: Names of the terms, from the lowest peak to the highest; at least two.
        peaks: Where each term has membership 1, increasing, at least ``MIN_SPACING`` of the universe apart.
        monotone: How the consequents move when the feature grows: ``"increasing"``, ``"decreasing"`` or None (unknown).
    """

    name: str
    universe: tuple[float, float]
    terms: tuple[str, ...]
    peaks: tuple[float, ...]
    monotone: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        object.__setattr__(self, "peaks", tuple(float(peak) for peak in self.peaks))
        check_identifier(self.name, "The name of a variable")
        object.__setattr__(self, "universe", check_interval(self.universe, f"The universe of '{self.name}'"))
        for term in self.terms:
            check_identifier(term, f"A term of '{self.name}',")
        (lower, upper), peaks, problem = self.universe, list(self.peaks), None
        spacing = MIN_SPACING * (upper - lower)
        if len(self.terms) < 2 or len(set(self.terms)) < len(self.terms) or ANY_TERM in self.terms:
            problem = (
                f"the terms {list(self.terms)}; two or more different names are allowed, and '{ANY_TERM}' is reserved; "
                "rename or add terms."
            )
        elif len(peaks) != len(self.terms) or not all(map(math.isfinite, peaks)):
            problem = (
                f"the peaks {peaks}; one finite number per term ({len(self.terms)}) is allowed; correct the peaks."
            )
        # a little slack: peaks that were spread to this distance are rounded
        elif peaks[0] < lower or peaks[-1] > upper or min(np.diff(peaks)) < spacing * (1 - 1e-3):
            problem = (
                f"the peaks {peaks}; peaks increase by at least {spacing:g} inside the universe {[lower, upper]}; "
                "reorder, spread or move them."
            )
        elif self.monotone not in DIRECTIONS:
            problem = (
                f"monotone={self.monotone!r}; 'increasing', 'decreasing' or nothing is allowed; choose one of these."
            )
        if problem:
            raise ValueError(f"'{self.name}' has {problem}")

    @property
    def sign(self) -> int:
        """Direction of the effect: 1 increasing, -1 decreasing, 0 unknown."""
        return DIRECTIONS[self.monotone]

    @classmethod
    def from_quantiles(
        cls,
        name: str,
        samples: np.ndarray,
        terms: Sequence[str] = THREE_TERMS,
        universe: tuple[float, float] = (0.0, 1.0),
        monotone: str | None = None,
        quantiles: Sequence[float] | None = None,
    ) -> LinguisticVariable:
        """Place the peaks at the ``(k + 1/2) / K`` quantiles of samples, so that every term has like mean membership.

        ``quantiles`` gives others for the K peaks, increasing in (0, 1), as where only a tail matters. For a (nearly)
        constant feature the peaks are spread to ``MIN_SPACING``, which is logged.

        Raises:
            ValueError: If there is no sample, or one is not finite or lies outside the universe.
        """
        values = np.asarray(samples, dtype=np.float64).ravel()
        lower, upper = universe
        slack = 1e-6 * (upper - lower)  # rounding of half-precision and single-precision features
        is_usable = (values >= lower - slack) & (values <= upper + slack)  # false for nan
        if not is_usable.all() or values.size == 0:
            raise ValueError(
                f"Of the {values.size} samples of '{name}', {int((~is_usable).sum())} are not finite or outside the "
                f"universe; one or more finite values in {list(universe)} are allowed; remove or rescale the others "
                "first."
            )
        num_terms = len(terms)
        shares = (np.arange(num_terms) + 0.5) / num_terms if quantiles is None else quantiles
        knots = np.quantile(values.clip(lower, upper), shares)
        # push equal quantiles apart, first upwards, then back below the upper border
        steps = MIN_SPACING * (upper - lower) * np.arange(num_terms)
        apart = np.maximum.accumulate(knots - steps) + steps
        peaks = np.minimum(apart, upper - steps[::-1]).clip(lower)
        if not np.array_equal(peaks, knots):
            logger.warning("Feature '%s' is nearly constant: peaks %s were spread to %s.", name, knots, peaks)
        return cls(name, universe, tuple(terms), tuple(peaks.tolist()), monotone)

    def flip_direction(self) -> LinguisticVariable:
        """Give the same variable acting in the other direction."""
        return replace(self, monotone=_OPPOSITE[self.monotone])

    def memberships(self, values: np.ndarray | float) -> np.ndarray:
        """Give the memberships of all terms in values (...), in double precision, (..., terms).

        They lie in [0, 1] and sum to one; outside the outer peaks they are constant.
        """
        peaks = np.asarray(self.peaks)
        values = np.asarray(values, dtype=np.float64)[..., None]
        # each ramp climbs from one peak to the next; a term is what it has climbed less what the next one has
        ramps = np.clip((values - peaks[:-1]) / np.diff(peaks), 0.0, 1.0)  # (..., terms - 1)
        ones, zeros = np.ones_like(values), np.zeros_like(values)
        return np.concatenate([ones, ramps], axis=-1) - np.concatenate([ramps, zeros], axis=-1)

    def fuzzy_sets(self) -> np.ndarray:
        """Give the terms as trapezoids for rule interpolation, (terms, 4), the end terms mirrored at their peak."""
        peaks = np.asarray(self.peaks)
        left = np.concatenate([[2 * peaks[0] - peaks[1]], peaks[:-1]])
        right = np.concatenate([peaks[1:], [2 * peaks[-1] - peaks[-2]]])
        return np.stack([left, peaks, peaks, right], axis=-1)


@dataclass(frozen=True)
class Consequent:
    """The conclusion of the rules.

    Attributes:
        name: Identifier of the conclusion.
        universe: Range in which the rules are written.
        rescale: Range of the output; the affine map from ``universe`` keeps the order. None: the universe itself.
    """

    name: str
    universe: tuple[float, float]
    rescale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_identifier(self.name, "The name of a consequent")
        object.__setattr__(self, "universe", check_interval(self.universe, f"The universe of '{self.name}'"))
        if self.rescale is not None:
            object.__setattr__(self, "rescale", check_interval(self.rescale, f"The rescale range of '{self.name}'"))

    @property
    def output_range(self) -> tuple[float, float]:
        """Smallest and largest output."""
        return self.universe if self.rescale is None else self.rescale

    def to_output(self, values: np.ndarray) -> np.ndarray:
        """Map values of the universe to the output range, any shape."""
        return _affine(values, self.universe, self.output_range)

    def from_output(self, values: np.ndarray) -> np.ndarray:
        """Map outputs back to the universe, any shape."""
        return _affine(values, self.output_range, self.universe)

    def contains(self, value: float) -> bool:
        """Say whether a value is finite and inside the universe."""
        return math.isfinite(value) and self.universe[0] <= value <= self.universe[1]


def _affine(values: np.ndarray, source: tuple[float, float], target: tuple[float, float]) -> np.ndarray:
    """Map ``source`` onto ``target``; equal ranges leave every bit alone."""
    values = np.asarray(values, dtype=np.float64)
    if source == target:
        return values.copy()
    scaled = target[0] + (values - source[0]) * ((target[1] - target[0]) / (source[1] - source[0]))
    return np.clip(scaled, *target)  # rounding only: nan (no rule) stays nan
