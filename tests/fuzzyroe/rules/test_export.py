"""Exported texts hold the partition and every rule; small parsers here rebuild the surface from them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fuzzyroe.rules import to_fcl, to_fis


def infer(memberships, rules, count):
    """Weighted average of rules (one function per antecedent, constant) at random points."""
    points = np.random.default_rng(0).random((count, len(memberships)))
    weights = [np.prod([memberships[j][k](points[:, j]) for j, k in enumerate(cell)], axis=0) for cell, _ in rules]
    constants = np.array([constant for _, constant in rules])
    return points, np.array(weights).T @ constants / np.sum(weights, axis=0)


@pytest.mark.parametrize("name", ["complete", "uneven"])
def test_fis_rebuilds_the_surface(name, request):
    rule_base = request.getfixturevalue(name)
    text = to_fis(rule_base)
    inputs = re.split(r"\[Input\d+\]", text.split("[Output1]")[0])[1:]
    memberships = []
    for block in inputs:
        corners = [np.array(found.split(), float) for found in re.findall(r"'trapmf',\[(.*?)\]", block)]
        memberships.append([lambda x, c=c: np.interp(x, c + 1e-12 * np.arange(4), [0, 1, 1, 0]) for c in corners])
    constants = [float(found) for found in re.findall(r"'constant',\[(.*?)\]", text)]
    rows = re.findall(r"^([\d ]+), (\d+) \(1\) : 1$", text, flags=re.M)
    rules = [([int(k) - 1 for k in cell.split()], constants[int(number) - 1]) for cell, number in rows]
    points, outputs = infer(memberships, rules, 200)
    assert f"NumRules={rule_base.num_rules}\n" in text
    np.testing.assert_allclose(outputs, rule_base.evaluate(points), atol=1e-9)


@pytest.mark.parametrize("name", ["complete", "uneven"])
def test_fcl_rebuilds_the_surface(name, request):
    rule_base = request.getfixturevalue(name)
    text = to_fcl(rule_base)
    memberships = []
    for block in re.findall(r"^FUZZIFY \w+\n(.*?)END_FUZZIFY", text, flags=re.M | re.S):
        terms = [re.findall(r"\((\S+), (\d)\)", line) for line in block.strip().splitlines()]
        corners = [np.array(term, float).T for term in terms]
        memberships.append([lambda x, c=c: np.interp(x, *c) for c in corners])
    constants = dict(re.findall(r"TERM (rule_\d+) := (\S+);", text))
    rules = []
    for condition, label in re.findall(r"RULE \d+ : IF (.*) THEN \w+ IS (\w+);", text):
        terms = re.findall(r"\(\w+ IS (\w+)\)", condition)
        cell = [variable.terms.index(term) for variable, term in zip(rule_base.antecedents, terms, strict=True)]
        rules.append((cell, float(constants[label])))
    points, outputs = infer(memberships, rules, 200)
    np.testing.assert_allclose(outputs, rule_base.evaluate(points), atol=1e-12)


def test_cells_without_a_rule_are_left_out(sparse):
    assert to_fcl(sparse).count("RULE ") == 15 and "NumRules=15\n" in to_fis(sparse)
