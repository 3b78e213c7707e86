"""A measured number with its bar."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from scripts.bench.speed.timing import Spread


@dataclass(frozen=True)
class Line:
    """One measured number.

    Attributes:
        name: What was measured.
        value: The number; None if it could not be measured, which meets no bar.
        at_least, at_most: The bar; neither for a number that only stands beside others.
        unit: Unit of all.
        spread: Quartiles of the repetitions, where there were any.
        note: Why there is no number, or what it stands for.
    """

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""
    spread: Spread | None = None
    note: str = ""

    @classmethod
    def of(cls, name: str, values: list[float], **options: Any) -> Line:
        """The median of repetitions, with its spread."""
        spread = Spread.of(values)
        return cls(name, spread.median, spread=spread, **options)

    @property
    def has_bar(self) -> bool:
        """Whether there is one."""
        return self.at_least is not None or self.at_most is not None

    @property
    def is_met(self) -> bool:
        """Whether the bar, if any, is met."""
        if self.value is None:
            return not self.has_bar
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def to_dict(self) -> dict[str, Any]:
        """As it is written to JSON."""
        return {**asdict(self), "met": self.is_met if self.has_bar else None}

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}{self.unit}"
        spread = f" ({self.spread.lower:.3g} to {self.spread.upper:.3g}, n {self.spread.count})" if self.spread else ""
        bar = ""
        if self.has_bar:
            sign, number = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
            bar = f"  bar {sign} {number:g}{self.unit}  {'met' if self.is_met else 'NOT MET'}"
        return f"{self.name:<88} {value:>12}{spread}{bar}{'  ' + self.note if self.note else ''}"
