"""Write-only export of a rule base to Fuzzy Control Language and to MATLAB's .fis, for readers with such tools.

Both express zero-order TSK exactly: product AND, singleton consequents, weighted average. Consequents are in output
units. There is no import: the dialects lose origins, directions and rescaling.

Reference:
    IEC 61131-7 (Fuzzy Control Language); MathWorks Fuzzy Logic Toolbox, fuzzy inference system files.
"""

from __future__ import annotations

import numpy as np

from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.variable import LinguisticVariable


def to_fcl(rule_base: FuzzyRuleBase) -> str:
    """Write one function block of Fuzzy Control Language; each rule has its own singleton ``rule_<n>``.

    Cells without a rule are left out.
    """
    name, rules = rule_base.consequent.name, _rules(rule_base)
    lines = [f"FUNCTION_BLOCK {rule_base.name}", "", "VAR_INPUT"]
    lines += [f"    {variable.name} : REAL;" for variable in rule_base.antecedents]
    lines += ["END_VAR", "", "VAR_OUTPUT", f"    {name} : REAL;", "END_VAR", ""]
    for variable in rule_base.antecedents:
        lines.append(f"FUZZIFY {variable.name}")
        for index, term in enumerate(variable.terms):
            points = " ".join(f"({x!r}, {y:.0f})" for x, y in _breakpoints(variable, index))
            lines.append(f"    TERM {term} := {points};")
        lines += ["END_FUZZIFY", ""]
    lower, upper = rule_base.consequent.output_range
    # COGS over singletons with PROD and BSUM is the weighted average, since firing strengths sum to one
    lines.append(f"DEFUZZIFY {name}")
    lines += [f"    TERM rule_{number} := {value!r};" for number, (_, value) in enumerate(rules, 1)]
    lines += ["    METHOD : COGS;", f"    DEFAULT := {rule_base.non_finite!r};"]
    lines += [f"    RANGE := ({lower!r} .. {upper!r});", "END_DEFUZZIFY", ""]
    lines += ["RULEBLOCK rules", "    AND : PROD;", "    ACT : PROD;", "    ACCU : BSUM;"]
    for number, (cell, _) in enumerate(rules, 1):
        pairs = zip(rule_base.antecedents, rule_base.terms_of(cell), strict=True)
        condition = " AND ".join(f"({variable.name} IS {term})" for variable, term in pairs)
        lines.append(f"    RULE {number} : IF {condition} THEN {name} IS rule_{number};")
    return "\n".join([*lines, "END_RULEBLOCK", "", "END_FUNCTION_BLOCK", ""])


def to_fis(rule_base: FuzzyRuleBase) -> str:
    """Write a Sugeno system as MATLAB .fis text; each rule has its own constant ``rule_<n>``.

    Cells without a rule are left out.
    """
    rules, consequent = _rules(rule_base), rule_base.consequent
    lines = ["[System]", f"Name='{rule_base.name}'", "Type='sugeno'", "Version=2.0"]
    lines += [f"NumInputs={len(rule_base.antecedents)}", "NumOutputs=1", f"NumRules={len(rules)}"]
    lines += ["AndMethod='prod'", "OrMethod='probor'", "ImpMethod='prod'"]
    lines += ["AggMethod='sum'", "DefuzzMethod='wtaver'", ""]
    for number, variable in enumerate(rule_base.antecedents, 1):
        lines += [f"[Input{number}]", f"Name='{variable.name}'", f"Range={_numbers(variable.universe)}"]
        lines.append(f"NumMFs={len(variable.terms)}")
        for index, term in enumerate(variable.terms):
            lines.append(f"MF{index + 1}='{term}':'trapmf',{_numbers(_trapezoid(variable, index))}")
        lines.append("")
    lines += ["[Output1]", f"Name='{consequent.name}'", f"Range={_numbers(consequent.output_range)}"]
    lines.append(f"NumMFs={len(rules)}")
    for number, (_, value) in enumerate(rules, 1):
        lines.append(f"MF{number}='rule_{number}':'constant',{_numbers([value])}")
    lines += ["", "[Rules]"]
    # MATLAB counts terms and constants from 1; then the weight in brackets, and 1 for AND
    for number, (cell, _) in enumerate(rules, 1):
        lines.append(f"{' '.join(str(k + 1) for k in cell)}, {number} (1) : 1")
    return "\n".join([*lines, ""])


def _rules(rule_base: FuzzyRuleBase) -> list[tuple[tuple[int, ...], float]]:
    """List cells with a rule and their outputs."""
    outputs = rule_base.output_table
    return [(cell, float(outputs[cell])) for cell in rule_base.cells() if not np.isnan(outputs[cell])]


def _breakpoints(variable: LinguisticVariable, index: int) -> list[tuple[float, int]]:
    """Give the corners of a term; beyond the outer ones FCL keeps the last value."""
    peaks = variable.peaks
    return [(peaks[k], int(k == index)) for k in (index - 1, index, index + 1) if 0 <= k < len(peaks)]


def _trapezoid(variable: LinguisticVariable, index: int) -> list[float]:
    """Give the corners of a term; end terms reach one universe beyond it, so that they stay 1 there."""
    peaks, (lower, upper) = variable.peaks, variable.universe
    width = upper - lower
    left = [lower - width, lower - width] if index == 0 else [peaks[index - 1], peaks[index]]
    right = [upper + width, upper + width] if index == len(peaks) - 1 else [peaks[index], peaks[index + 1]]
    return [*left, *right]


def _numbers(values: tuple[float, ...] | list[float]) -> str:
    """Write a bracketed list of numbers."""
    return f"[{' '.join(repr(float(value)) for value in values)}]"
