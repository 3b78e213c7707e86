"""Switches for the choices in which RoE's published code differs from this implementation.

Every switch changes data that the one implementation works on (where routing tokens stand, which positions they read,
a number); none selects other code for the same thing. ``PUBLISHED`` sets all of them as the published training and
evaluation do, so that their numbers can be compared with ours.

Reference:
    RoE (arXiv:2407.14093) and its published code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from fuzzyroe.routers.roe.objective import DAMPING

UNITS_PER_RUN = 200
"""The published schedule cuts a run into this many units."""


@dataclass(frozen=True)
class RoECompat:
    """Switches; each default is what this implementation does on its own.

    Attributes:
        tokens_in_front: Routing tokens stand before the prompt; each reads itself and its own segment only, which lies
            behind it. By default each stands behind its segment and reads all that lies before it, causally.
        image_segment_takes_one_more: In training the segment of the image has the first position of the question too.
            By default it ends where the question begins, in training as at inference.
        tokens_take_positions: In training routing tokens count as the first positions of the sequence; at inference
            each has position 1. By default each has the position of what it stands behind, and moves nothing.
        ties_skip: A layer whose two logits are equal is skipped. By default it is kept.
        batch_decides_together: A layer runs for the whole batch if one row keeps it. By default every row decides.
        whole_units: The schedule counts whole units of steps (1/200 of the run, rounded down), so phases end early and
            the temperature falls too far in short runs. By default it follows the exact progress.
        damping: How fast the hinge of the objective fades with the loss. The published evaluation code, which can
            train too, has 1.
    """

    tokens_in_front: bool = False
    image_segment_takes_one_more: bool = False
    tokens_take_positions: bool = False
    ties_skip: bool = False
    batch_decides_together: bool = False
    whole_units: bool = False
    damping: float = DAMPING

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoECompat:
        """Read what ``to_dict`` gave.

        Raises:
            ValueError: If a switch is unknown.
        """
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            known = ", ".join(item.name for item in fields(cls))
            raise ValueError(f"Unknown RoE switches {unknown}; known are {known}. Correct the router's options.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The switches as JSON knows them."""
        return asdict(self)


OURS = RoECompat()
PUBLISHED = RoECompat(
    tokens_in_front=True,
    image_segment_takes_one_more=True,
    tokens_take_positions=True,
    ties_skip=True,
    batch_decides_together=True,
    whole_units=True,
)
PRESETS: dict[str, RoECompat] = {
    "ours": OURS,
    "published": PUBLISHED,
    "front": RoECompat(tokens_in_front=True),
}
"""Sets of switches by name: ``front`` has the published layout and attention rules without the off-by-ones."""


def run_progress(step: float, num_steps: float, compat: RoECompat = OURS) -> float:
    """Share of a run that is done, as the schedule counts it; above 1 is possible with ``whole_units``.

    Args:
        step: Steps done.
        num_steps: Steps of the whole run.
        compat: ``whole_units`` is read.

    Raises:
        ValueError: If whole units are asked for in a run that is shorter than their number.
    """
    if not compat.whole_units:
        return step / num_steps
    # rounded down, as published: short runs reach the end of the schedule early
    unit = int(num_steps / UNITS_PER_RUN)
    if unit < 1:
        raise ValueError(
            f"A run of {num_steps:g} steps has no whole unit of 1/{UNITS_PER_RUN}; at least {UNITS_PER_RUN} steps are "
            "needed. Switch whole_units off, or train longer."
        )
    return int(step) / (UNITS_PER_RUN * unit)
