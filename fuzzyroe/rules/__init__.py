"""Fuzzy rule bases: definition, completion, fitting, inference."""

from fuzzyroe.rules.export import to_fcl, to_fis
from fuzzyroe.rules.fitting import RuleReport, effective_examples, fit_consequents
from fuzzyroe.rules.interpolation import InterpolationOptions, conclude
from fuzzyroe.rules.rule_base import FuzzyRuleBase
from fuzzyroe.rules.skfuzzy_bridge import compile_control_system, compile_rule_base, to_control_system
from fuzzyroe.rules.tsk import ZeroOrderTSK
from fuzzyroe.rules.variable import Consequent, LinguisticVariable
from fuzzyroe.rules.yaml_io import (
    dump_rule_base,
    load_rule_base,
    parse_rule_base,
    save_rule_base,
    shipped_rule_bases,
)

__all__ = [
    "Consequent",
    "FuzzyRuleBase",
    "InterpolationOptions",
    "LinguisticVariable",
    "RuleReport",
    "ZeroOrderTSK",
    "compile_control_system",
    "compile_rule_base",
    "conclude",
    "dump_rule_base",
    "effective_examples",
    "fit_consequents",
    "load_rule_base",
    "parse_rule_base",
    "save_rule_base",
    "shipped_rule_bases",
    "to_control_system",
    "to_fcl",
    "to_fis",
]
