"""Escalation policies: who runs more layers than planned, decided by rules behind the prefill.

A plan is made before the first layer, where little is known of how hard a prompt is. Behind the skipped prefill the
model's own doubt can be read for nothing: the margin between the two likeliest first tokens of the answer. A policy
turns what was read into a doubt, and thresholds turn the doubt into a level for each row: keep the plan, go on under a
shallower one, or run all layers. ``fuzzyroe.resume`` carries it out.

Reference:
    Cascades that defer by confidence: CALM (arXiv:2207.07061), Gatekeeper (arXiv:2502.19335).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fuzzyroe.features import ANSWER_FEATURES, FEATURES, compute_features, summarise
from fuzzyroe.prompt_hash import prompt_hashes, uniforms
from fuzzyroe.resume import ALL_LAYERS, KEEP_PLAN, SHALLOWER_PLAN
from fuzzyroe.routing_state import RoutingState

if TYPE_CHECKING:  # the rules load scikit-fuzzy, which a model without them does without
    from fuzzyroe.rules import FuzzyRuleBase

TAIL_QUANTILES = (0.02, 0.06, 0.12, 0.25, 0.60)
"""Where the knots of the answer's margin stand among unlabelled margins: what matters is the lowest quarter."""

RANDOM_DRAW = "random_draw"
"""Reading of the policy ``random``: a number in [0, 1) that follows from the prompt."""

Readings = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Escalation:
    """A policy and the doubts from which it acts.

    Attributes:
        policy: Name in ``POLICIES``.
        all_from: Doubt from which a row runs all layers; None for never.
        shallower_from: Doubt from which it follows a shallower plan; None for never.
        shallower_ratio: Target skip ratio of the shallower plan over that of the plan, in [0, 1).
        rule_base: Rules of the policy ``fuzzy``, a complete rule base from antecedents to doubt.
        seed: Of the policy ``random``; another seed gives other draws.
    """

    policy: str
    all_from: float | None = 0.5
    shallower_from: float | None = None
    shallower_ratio: float = 0.5
    rule_base: FuzzyRuleBase | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise KeyError(f"Escalation policy '{self.policy}' is unknown; use one of {', '.join(POLICIES)}.")
        if not 0 <= self.shallower_ratio < 1:
            raise ValueError(f"shallower_ratio is {self.shallower_ratio}; choose in [0, 1), 0.5 is usual.")
        if self.policy != "fuzzy":
            return
        if self.rule_base is None:
            raise ValueError("The policy 'fuzzy' has no rules; use Escalation.make, or pass rule_base.")
        unknown = [v.name for v in self.rule_base.antecedents if v.name not in {*FEATURES, *ANSWER_FEATURES}]
        if unknown:
            raise KeyError(
                f"Rule base '{self.rule_base.name}' has antecedents {unknown}, which are no features; use "
                f"{', '.join([*ANSWER_FEATURES, *FEATURES])}."
            )

    @classmethod
    def make(cls, policy: str, rules: str = "escalate", **options: Any) -> Escalation:
        """Make an escalation; the policy ``fuzzy`` takes its rules from a shipped rule base or a file.

        >>> Escalation.make("fuzzy").doubts({"answer_margin": np.array([0.0, 0.9])}).round(2).tolist()
        [1.0, 0.0]
        """
        if policy == "fuzzy":
            from fuzzyroe.rules import load_rule_base

            rule_base = load_rule_base(rules)
            options["rule_base"] = rule_base if rule_base.is_complete else rule_base.interpolate()
        return cls(policy, **options)

    @property
    def early_antecedents(self) -> tuple[str, ...]:
        """Antecedents that are known before the first layer."""
        rules = () if self.rule_base is None else self.rule_base.antecedents
        return tuple(variable.name for variable in rules if variable.name in FEATURES)

    def read_prompts(self, hidden_states: Tensor, routing: RoutingState) -> dict[str, Tensor]:
        """Read what the policy wants to know before the first layer.

        Args:
            hidden_states: States before the first decoder layer, (B, N, D).
            routing: Says where images and questions are.

        Returns:
            Readings of the last turn of each row, (B,) each.
        """
        columns: dict[str, Tensor] = {}  # of all turns, (B, T)
        if self.policy == "random":
            columns[RANDOM_DRAW] = uniforms(prompt_hashes(hidden_states, routing), 1, self.seed)[..., 0]
        if self.early_antecedents:
            summary = summarise(hidden_states, routing, routing.planned_turns())
            values = compute_features(summary, self.early_antecedents)
            columns |= dict(zip(self.early_antecedents, values.unbind(dim=-1), strict=True))
        last_turn = (routing.turn_ids.amax(dim=1, keepdim=True) - 1).clamp(min=0)  # (B, 1)
        return {name: values.gather(1, last_turn.to(values.device)).squeeze(1) for name, values in columns.items()}

    def doubts(self, readings: Readings) -> np.ndarray:
        """Give the doubt of each row, in [0, 1], from readings by name, (B,) each; 1 where they are no numbers."""
        return np.nan_to_num(POLICIES[self.policy](self, readings), nan=1.0)

    def levels(self, doubts: np.ndarray) -> np.ndarray:
        """Give the level of each row, (B,) int64."""
        levels = np.full(len(doubts), KEEP_PLAN)
        for level, start in ((SHALLOWER_PLAN, self.shallower_from), (ALL_LAYERS, self.all_from)):
            if start is not None:
                levels[doubts >= start] = level
        return levels

    def calibrate(self, readings: Readings, share: float, shallower_share: float = 0.0) -> Escalation:
        """Escalate a share of prompts like those that were read; no answer and no label is needed.

        Args:
            readings: Of calibration prompts after their planned prefill, by name, (n,) each
                (``RoutingResult.escalation.readings``).
            share: Share of rows that are to run all layers, in [0, 1].
            shallower_share: Share that is to follow a shallower plan; both together are at most 1.

        Returns:
            The escalation with knots at quantiles of the readings, and with thresholds. Where doubts are equal more
            rows may be escalated; ``always`` and ``never`` have no share and stay as they are.

        Raises:
            ValueError: If a share is out of range, or there are no readings.
        """
        if min(share, shallower_share) < 0 or share + shallower_share > 1 or len(readings["answer_margin"]) == 0:
            raise ValueError(
                f"Shares {share} and {shallower_share} of {len(readings['answer_margin'])} prompts were asked for; "
                "allowed are shares from 0 that sum to at most 1, of at least one prompt."
            )
        if self.policy in ("always", "never"):
            return self
        placed = self if self.rule_base is None else replace(self, rule_base=_place_knots(self.rule_base, readings))
        doubts = placed.doubts(readings)

        def start(portion: float) -> float | None:
            return float(np.quantile(doubts, 1 - portion)) if portion > 0 else None

        shallower_from = start(share + shallower_share) if shallower_share > 0 else None
        return replace(placed, all_from=start(share), shallower_from=shallower_from)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the rules to ``escalation.yaml`` in a folder, and give the options as JSON knows them."""
        options = {**asdict(replace(self, policy="never", rule_base=None)), "policy": self.policy}
        if self.rule_base is not None:
            from fuzzyroe.rules import save_rule_base

            options["rule_base"] = "escalation.yaml"
            save_rule_base(self.rule_base, folder / options["rule_base"])
        return options

    @classmethod
    def load(cls, options: Mapping[str, Any], find_file: Callable[[str], str] = str) -> Escalation:
        """Read what ``save`` gave; ``find_file`` gives the local path of a file of the checkpoint."""
        options = dict(options)
        rules = options.pop("rule_base")
        return cls.make(**options) if rules is None else cls.make(**options, rules=find_file(rules))


def _by_rules(escalation: Escalation, readings: Readings) -> np.ndarray:
    rules: Any = escalation.rule_base
    points = np.stack([readings[variable.name] for variable in rules.antecedents], axis=1).astype(np.float64)
    is_known = np.atleast_1d(np.isfinite(points).all(axis=1))
    return np.where(is_known, rules.evaluate(np.where(is_known[:, None], points, 0.0)), rules.non_finite)


POLICIES: dict[str, Callable[[Escalation, Readings], np.ndarray]] = {
    "fuzzy": _by_rules,
    "margin": lambda escalation, readings: 1.0 - np.asarray(readings["answer_margin"], dtype=np.float64),
    "random": lambda escalation, readings: np.asarray(readings[RANDOM_DRAW], dtype=np.float64),
    "never": lambda escalation, readings: np.zeros(len(readings["answer_margin"])),
    "always": lambda escalation, readings: np.ones(len(readings["answer_margin"])),
}
"""What makes a doubt of readings, by name: rules, the margin alone, chance, and the two ends."""


def _place_knots(rule_base: FuzzyRuleBase, readings: Readings) -> FuzzyRuleBase:
    """Move the knots of antecedents to quantiles of readings: in the tail of doubtful answers, else of equal mass."""
    from fuzzyroe.rules import LinguisticVariable

    peaks = []
    for variable in rule_base.antecedents:
        values, num_terms = readings[variable.name], len(variable.terms)
        quantiles = None
        if variable.name in ANSWER_FEATURES and num_terms == len(TAIL_QUANTILES):
            # a small margin is in doubt, and a large entropy
            upper = tuple(1 - quantile for quantile in reversed(TAIL_QUANTILES))
            quantiles = TAIL_QUANTILES if variable.name == "answer_margin" else upper
        placed = LinguisticVariable.from_quantiles(
            variable.name, values, variable.terms, variable.universe, variable.monotone, quantiles
        )
        peaks.append(placed.peaks)
    provenance = {**rule_base.provenance, "knots": {"examples": len(values)}}
    return replace(rule_base.with_knots(peaks), provenance=provenance)
