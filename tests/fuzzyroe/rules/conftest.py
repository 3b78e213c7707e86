"""Rule bases shared by the tests of this folder."""

from __future__ import annotations

import numpy as np
import pytest

from fuzzyroe.rules import Consequent, FuzzyRuleBase, LinguisticVariable, load_rule_base


@pytest.fixture(scope="session")
def sparse() -> FuzzyRuleBase:
    """The published fifteen rules, raw."""
    return load_rule_base("published_raw")


@pytest.fixture(scope="session")
def complete() -> FuzzyRuleBase:
    """The default rule base, completed."""
    return load_rule_base("default").interpolate()


@pytest.fixture(scope="session")
def uneven() -> FuzzyRuleBase:
    """A complete rule base whose variables have 2, 4 and 3 terms at uneven peaks, one acting downwards, one unknown."""
    variables = (
        LinguisticVariable("a", (0, 1), ("low", "high"), (0.2, 0.7), "increasing"),
        LinguisticVariable("b", (-1, 3), ("one", "two", "three", "four"), (-0.9, 0.1, 0.4, 2.5), "decreasing"),
        LinguisticVariable("c", (0, 1), ("low", "medium", "high"), (0.0, 0.31, 1.0), None),
    )
    table = np.random.default_rng(3).random((2, 4, 3))
    table = np.sort(np.sort(table, axis=0), axis=1)[:, ::-1]
    return FuzzyRuleBase("uneven", variables, table, np.full(table.shape, "expert"), Consequent("y", (0, 1)))
