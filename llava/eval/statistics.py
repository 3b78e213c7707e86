"""The paired comparison of two runs on the same questions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

NORMAL_QUANTILE = 1.959963984540054
"""97.5 % quantile of the standard normal distribution, for two-sided 95 % intervals."""


@dataclass(frozen=True)
class PairedDifference:
    """How much more often a run is right than a reference, on the same questions.

    Attributes:
        difference: Accuracy of the run minus accuracy of the reference, in [-1, 1].
        lower, upper: 95 % confidence interval of the difference.
        num_items: Questions, n.
        num_gained: Questions the run gets right, the reference wrong.
        num_lost: Questions the run gets wrong, the reference right.
    """

    difference: float
    lower: float
    upper: float
    num_items: int
    num_gained: int
    num_lost: int


def paired_difference(reference: Mapping[str, int], run: Mapping[str, int]) -> PairedDifference:
    """Compare a run with a reference, question by question.

    The difference is ``(gained - lost) / n``. Its interval is the normal one on the paired differences after adding
    half a question to each cell of the 2 x 2 table (right or wrong, by run): with ``b = gained + 1/2``,
    ``c = lost + 1/2`` and ``m = n + 2`` it is ``(b - c) / m ± 1.96 sqrt(b + c - (b - c)^2 / m) / m``. The added halves
    keep the interval from collapsing to nothing when two runs answer all questions alike, and need no random numbers.
    Questions are taken as independent; the choice of a reference among several runs is not corrected for.

    Args:
        reference: 1 (right) or 0 (wrong) per question.
        run: The same for the other run, on the same questions.

    Returns:
        Difference and interval, clipped to [-1, 1].

    Raises:
        ValueError: If there is no question, the questions differ, or a value is neither 0 nor 1.

    Reference:
        Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
        Medicine 24(5), 2005.
    """
    check_same_questions(reference, run)
    for name, answers in {"reference": reference, "run": run}.items():
        strange = next((f"{value!r} for '{key}'" for key, value in answers.items() if value not in (0, 1)), None)
        if strange:
            raise ValueError(f"The {name} has {strange}; 0 (wrong) and 1 (right) are allowed; correct the file.")
    gained = sum(run[key] > value for key, value in reference.items())
    lost = sum(run[key] < value for key, value in reference.items())
    total = len(reference) + 2
    centre = (gained - lost) / total
    spread = gained + lost + 1 - (gained - lost) ** 2 / total
    margin = NORMAL_QUANTILE * math.sqrt(spread) / total
    lower, upper = max(-1.0, centre - margin), min(1.0, centre + margin)
    return PairedDifference((gained - lost) / len(reference), lower, upper, len(reference), gained, lost)


def check_same_questions(
    reference: Mapping[str, int], run: Mapping[str, int], names: tuple[str, str] = ("", "")
) -> None:
    """Refuse to pair runs on different questions.

    Args:
        reference: Answers by question.
        run: Answers by question.
        names: What to call the two in the message.

    Raises:
        ValueError: If one has a question that the other lacks, or there is none.
    """
    first, second = (name or default for name, default in zip(names, ("the reference", "the run"), strict=True))
    if not reference and not run:
        raise ValueError(
            f"Neither {first} nor {second} has a question to pair; at least one is needed; check 'correct'."
        )
    for one, other, has, lacks in ((reference, run, first, second), (run, reference, second, first)):
        missing = [key for key in one if key not in other]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(one)} questions of {has} are not in {lacks}, the first is '{missing[0]}'; a "
                "paired comparison needs the same questions in both. Evaluate both on the same file."
            )
