"""A linguistic variable: a feature with named triangular terms whose memberships sum to one.

The partition is a Ruspini partition: each term peaks at its own knot and falls to zero at its neighbours' knots; the
first and the last term continue as shoulders. It is therefore fixed by its peaks alone, covers every value and cannot
have gaps.
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


def check_identifier(name: object, what: str) -> None:
    """Refuse a name that scikit-fuzzy, FCL or MATLAB could not carry.

    Raises:
        ValueError: If ``name`` is not letters, digits and underscores, starting with a letter or an underscore.
    """
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} is not an identifier; letters, digits and underscores are allowed, not starting with a "
            "digit; rename it."
        )


def check_interval(interval: tuple[float, float], what: str) -> None:
    """Refuse an interval that is not two finite numbers in increasing order.

    Raises:
        ValueError: If the bounds are not finite or not increasing.
    """
    if len(interval) != 2 or not all(map(math.isfinite, interval)) or interval[0] >= interval[1]:
        raise ValueError(
            f"{what} is {list(interval)}; two finite numbers [lower, upper] with lower < upper are allowed; correct it."
        )


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
        object.__setattr__(self, "universe", tuple(float(bound) for bound in self.universe))
        object.__setattr__(self, "terms", tuple(self.terms))
        object.__setattr__(self, "peaks", tuple(float(peak) for peak in self.peaks))
        check_identifier(self.name, "The name of a variable")
        check_interval(self.universe, f"The universe of '{self.name}'")
        self._check_terms()
        self._check_peaks()
        if self.monotone not in DIRECTIONS:
            raise ValueError(
                f"'{self.name}' has monotone={self.monotone!r}; 'increasing', 'decreasing' or nothing is allowed; "
                "choose one of these."
            )

    def _check_terms(self) -> None:
        for term in self.terms:
            check_identifier(term, f"A term of '{self.name}',")
        if len(self.terms) < 2 or len(set(self.terms)) < len(self.terms) or ANY_TERM in self.terms:
            raise ValueError(
                f"'{self.name}' has the terms {list(self.terms)}; two or more different names are allowed, and "
                f"'{ANY_TERM}' is reserved; rename or add terms."
            )

    def _check_peaks(self) -> None:
        if len(self.peaks) != len(self.terms) or not all(map(math.isfinite, self.peaks)):
            raise ValueError(
                f"'{self.name}' has the peaks {list(self.peaks)}; one finite number per term ({len(self.terms)}) is "
                "allowed; correct the peaks."
            )
        lower, upper = self.universe
        if self.peaks[0] < lower or self.peaks[-1] > upper or min(np.diff(self.peaks)) < self.min_spacing * (1 - 1e-3):
            raise ValueError(
                f"'{self.name}' has the peaks {list(self.peaks)}; peaks increase by at least {self.min_spacing:g} "
                f"inside the universe {list(self.universe)}; reorder, spread or move them."
            )

    @property
    def min_spacing(self) -> float:
        """Smallest allowed distance of two peaks, in units of the feature."""
        return MIN_SPACING * (self.universe[1] - self.universe[0])

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
    ) -> LinguisticVariable:
        """Place the peaks at the ``(k + 1/2) / K`` quantiles, so that every term has mean membership about 1 / K.

        Args:
            name: Identifier of the feature.
            samples: Observed values inside the universe, any shape, at least one.
            terms: Names of the K terms, from low to high.
            universe: Smallest and largest value.
            monotone: Direction of the effect, see the class.

        Returns:
            A variable whose peaks are at least ``MIN_SPACING`` apart: for a (nearly) constant feature they are spread,
            which is logged.

        Raises:
            ValueError: If there is no sample, or one is not finite or lies outside the universe.
        """
        values = np.asarray(samples, dtype=np.float64).ravel()
        lower, upper = universe
        slack = 1e-6 * (upper - lower)  # rounding of half-precision and single-precision features
        if (
            values.size == 0
            or not np.isfinite(values).all()
            or values.min() < lower - slack
            or values.max() > upper + slack
        ):
            raise ValueError(
                f"The samples of '{name}' are {_describe(values)}; one or more finite values in {list(universe)} are "
                "allowed; remove or rescale the others first."
            )
        num_terms = len(terms)
        quantiles = np.quantile(values.clip(lower, upper), (np.arange(num_terms) + 0.5) / num_terms)
        peaks = _spread(quantiles, MIN_SPACING * (upper - lower), lower, upper)
        if not np.array_equal(peaks, quantiles):
            logger.warning("Feature '%s' is nearly constant: peaks %s were spread to %s.", name, quantiles, peaks)
        return cls(name, universe, tuple(terms), tuple(peaks.tolist()), monotone)

    def with_peaks(self, peaks: Sequence[float]) -> LinguisticVariable:
        """Give the same variable with other peaks."""
        return replace(self, peaks=tuple(peaks))

    def flip_direction(self) -> LinguisticVariable:
        """Give the same variable acting in the other direction."""
        return replace(self, monotone={1: "decreasing", -1: "increasing", 0: None}[self.sign])

    def memberships(self, values: np.ndarray) -> np.ndarray:
        """Evaluate all terms in double precision.

        Args:
            values: Values of the feature, any shape (...,); outside the outer peaks the memberships are constant.

        Returns:
            Memberships in [0, 1] that sum to one over the last axis, (..., terms).
        """
        peaks = np.asarray(self.peaks)
        values = np.asarray(values, dtype=np.float64)[..., None]
        ramps = np.clip((values - peaks[:-1]) / np.diff(peaks), 0.0, 1.0)  # (..., terms - 1)
        ones, zeros = np.ones_like(values), np.zeros_like(values)
        return np.concatenate([ones, ramps], axis=-1) - np.concatenate([ramps, zeros], axis=-1)

    def fuzzy_sets(self) -> np.ndarray:
        """Give the terms as trapezoids for rule interpolation, the end terms mirrored at their peak.

        Returns:
            Left foot, left and right shoulder, right foot per term, (terms, 4).
        """
        peaks = np.asarray(self.peaks)
        left = np.concatenate([[2 * peaks[0] - peaks[1]], peaks[:-1]])
        right = np.concatenate([peaks[1:], [2 * peaks[-1] - peaks[-2]]])
        return np.stack([left, peaks, peaks, right], axis=-1)


@dataclass(frozen=True)
class Consequent:
    """What the rules conclude.

    Attributes:
        name: Identifier of the conclusion.
        universe: Range in which the rules are written.
        rescale: Range of the output; the affine map from ``universe`` keeps the order. None: the universe itself.
    """

    name: str
    universe: tuple[float, float]
    rescale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "universe", tuple(float(bound) for bound in self.universe))
        check_identifier(self.name, "The name of a consequent")
        check_interval(self.universe, f"The universe of '{self.name}'")
        if self.rescale is not None:
            object.__setattr__(self, "rescale", tuple(float(bound) for bound in self.rescale))
            check_interval(self.rescale, f"The rescale range of '{self.name}'")

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


def _spread(peaks: np.ndarray, spacing: float, lower: float, upper: float) -> np.ndarray:
    """Push sorted peaks apart to ``spacing``, staying inside [lower, upper]."""
    steps = spacing * np.arange(len(peaks))
    apart = np.maximum.accumulate(peaks - steps) + steps
    return np.minimum(apart, upper - steps[::-1]).clip(lower)


def _describe(values: np.ndarray) -> str:
    """Say in words what is in an array of samples."""
    if values.size == 0:
        return "empty"
    num_bad = int((~np.isfinite(values)).sum())
    return f"{num_bad} non-finite of {values.size}" if num_bad else f"in [{values.min():g}, {values.max():g}]"
