"""The bridge to scikit-fuzzy, which defines what a rule base means.

A rule base becomes a ``ControlSystem`` of skfuzzy variables, terms and rules; the torch tables are read back from those
objects and checked against their firing strengths. scikit-fuzzy itself computes Mamdani inference, never in a forward
pass; one box-shaped consequent term per constant, product AND and summed activations make its centroid the weighted
mean of zero-order TSK.

scikit-fuzzy keeps inputs and results on the variables, shared by all simulations and threads, and keeps every term ever
computed in class-level dictionaries. Hence one lock around every use, one private simulation key per call, and no trace
left after it.
"""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import networkx
import numpy as np
import torch
from skfuzzy import control
from skfuzzy.control.controlsystem import CrispValueCalculator
from skfuzzy.control.term import Term, TermAggregate

from fuzzyroe.rules.rule_base import NO_RULE, FuzzyRuleBase
from fuzzyroe.rules.tsk import ZeroOrderTSK
from fuzzyroe.rules.variable import Consequent, LinguisticVariable

VERIFICATION_POINTS = 512
_BOX_HALF_WIDTH = 1e-6  # of a consequent constant, as a share of the universe
_SAME_CONSTANT = 1e-9  # constants closer than this share of the universe get one term
_LOCK = threading.RLock()
_CALLS = itertools.count()


def compile_rule_base(rule_base: FuzzyRuleBase, tolerance: float = 1e-6) -> ZeroOrderTSK:
    """Compile a complete rule base through scikit-fuzzy: build its objects, read the tables back, verify them.

    Peaks are rounded to float32, the precision of the module, before building.

    Raises:
        ValueError: If a combination of terms has no rule.
        RuntimeError: If firing strengths of the module and of scikit-fuzzy differ by more than the tolerance.
    """
    names, consequent = [variable.name for variable in rule_base.antecedents], rule_base.consequent.name
    rounded = [
        np.asarray(variable.peaks, dtype=np.float32).astype(np.float64).clip(*variable.universe).tolist()
        for variable in rule_base.antecedents
    ]
    with _temporary_system(rule_base.with_knots(rounded)) as system:
        compiled = compile_control_system(system, names, consequent, non_finite=rule_base.non_finite)
        module = ZeroOrderTSK.from_rule_base(compiled)
        verify(module, system, names, consequent, tolerance=tolerance)
    return module


def to_control_system(rule_base: FuzzyRuleBase) -> control.ControlSystem:
    """Express a rule base in scikit-fuzzy: product AND, one box-shaped term per constant, summed activations.

    Its outputs are in the output range of the rule base. Rule labels name their terms.
    """
    with _quiet_lock():
        antecedents = [_to_antecedent(variable) for variable in rule_base.antecedents]
        outputs = rule_base.output_table
        consequent, term_of = _to_consequent(rule_base.consequent, outputs[~np.isnan(outputs)])
        rules = []
        for cell in map(tuple, np.argwhere(~np.isnan(outputs))):
            terms = rule_base.terms_of(cell)
            condition = antecedents[0][terms[0]]
            for antecedent, term in zip(antecedents[1:], terms[1:], strict=True):
                condition = condition & antecedent[term]
            label = ", ".join(f"{v.name} {term}" for v, term in zip(rule_base.antecedents, terms, strict=True))
            rules.append(control.Rule(condition, consequent[term_of(outputs[cell])], label, and_func=np.multiply))
        system = control.ControlSystem()
        # addrule() re-derives the order of all earlier rules each time: 243 rules would take most of a minute
        system.graph = networkx.compose_all([rule.graph for rule in rules])
        return system


def compile_control_system(
    system: control.ControlSystem, antecedents: Sequence[str], consequent: str, non_finite: float = 1.0
) -> FuzzyRuleBase:
    """Read a rule base out of a control system.

    Args:
        system: Rules that join terms by product AND and conclude one narrow term; an absent antecedent means "any".
        antecedents: Names of the antecedents, in the order of the features.
        consequent: Name of the consequent.
        non_finite: Output for non-finite features.

    Returns:
        A rule base in the units of the consequent; its cells count as expert rules.

    Raises:
        ValueError: If this is no zero-order TSK system over partitions that sum to one.
    """
    with _quiet_lock():
        nodes = [_node(system.antecedents, name, "antecedent") for name in antecedents]
        extra = {node.label for node in system.antecedents} - set(antecedents)
        if extra:
            raise ValueError(f"The system also has the antecedents {sorted(extra)}; all must be listed; add them.")
        target = _node(system.consequents, consequent, "consequent")
        variables = tuple(_read_variable(node) for node in nodes)
        shape = tuple(len(variable.terms) for variable in variables)
        table = np.full(shape, np.nan)
        owner: dict[tuple[int, ...], str] = {}
        for rule in _rules(system):
            value = _read_constant(_check_rule(rule, target))
            for cell in _cells_of(rule, variables):
                if cell in owner and not np.isclose(table[cell], value, rtol=0, atol=_SAME_CONSTANT):
                    raise ValueError(
                        f"The rules '{owner[cell]}' and '{rule.label}' conclude {table[cell]:g} and {value:g} for "
                        "the same terms; one consequent per combination is allowed; remove one rule."
                    )
                table[cell], owner[cell] = value, rule.label
        _check_accumulation(system, target)
        source = np.where(np.isnan(table), NO_RULE, "expert")
        universe = (float(min(target.universe[0], np.nanmin(table))), float(max(target.universe[-1], np.nanmax(table))))
        return FuzzyRuleBase(
            "control_system", variables, table, source, Consequent(consequent, universe), non_finite=non_finite
        )


def verify(
    module: ZeroOrderTSK,
    system: control.ControlSystem,
    antecedents: Sequence[str],
    consequent: str,
    tolerance: float = 1e-6,
    num_points: int = VERIFICATION_POINTS,
) -> float:
    """Compare the firing strengths of a module with those of scikit-fuzzy's own rule trees at random points.

    Gives the largest difference, or a ``RuntimeError`` if it exceeds the tolerance.
    """
    rule_base = compile_control_system(system, antecedents, consequent)
    lower, upper = np.array([variable.universe for variable in rule_base.antecedents]).T
    points = np.random.default_rng(0).uniform(lower, upper, (num_points, len(lower))).astype(np.float32)
    expected = firing_strengths(system, points.astype(np.float64), antecedents)
    with torch.no_grad():
        actual = module.firing_strengths(torch.from_numpy(points)).double().numpy()
    error = 0.0
    # a rule that leaves out an antecedent fires as all the cells that it covers do together
    for rule, strengths in zip(_rules(system), expected.T, strict=True):
        together = actual[:, _columns_of(rule, rule_base)].sum(axis=1)
        error = max(error, float(np.abs(together - strengths).max()))
    if error > tolerance:
        raise RuntimeError(
            f"The torch module and scikit-fuzzy differ by {error:.2e} in firing strength; {tolerance:.0e} is allowed; "
            "report this rule base as a defect."
        )
    return error


def firing_strengths(
    system: FuzzyRuleBase | control.ControlSystem, points: np.ndarray, antecedents: Sequence[str] = ()
) -> np.ndarray:
    """Fire the rules with scikit-fuzzy, without its slow and lossy defuzzification.

    Args:
        system: A rule base or a control system.
        points: Feature vectors, finite, (n, D).
        antecedents: Names in the order of the columns; needed for a control system only.

    Returns:
        A column per cell of a rule base, zero where there is no rule; a column per rule of a control system, by label.
    """
    if isinstance(system, FuzzyRuleBase):
        table = np.zeros((len(points), system.num_rules))
        with _temporary_system(system) as built:
            strengths = firing_strengths(built, points, [variable.name for variable in system.antecedents])
            for rule, column in zip(_rules(built), strengths.T, strict=True):
                table[:, _columns_of(rule, system)] = column[:, None]
        return table
    points = _check_points(points, antecedents)
    with _quiet_lock(), _private_simulation(system) as simulation:
        for name, column in zip(antecedents, points.T, strict=True):
            node = _node(system.antecedents, name, "antecedent")
            # memberships outside the universe are zero in scikit-fuzzy: clip as its own input acceptor does
            CrispValueCalculator(node, simulation).fuzz(column.clip(node.universe[0], node.universe[-1]))
        columns = []
        for rule in _rules(system):
            if isinstance(rule.antecedent, TermAggregate):
                rule.antecedent.agg_methods = rule._aggregation_methods  # else AND is the default minimum
            columns.append(np.asarray(rule.antecedent.membership_value[simulation], dtype=np.float64))
        return np.stack(columns, axis=1)


def evaluate(
    system: FuzzyRuleBase | control.ControlSystem,
    points: np.ndarray,
    antecedents: Sequence[str] = (),
    consequent: str = "",
) -> np.ndarray:
    """Run scikit-fuzzy's own inference and centroid defuzzification, (n,); about 0.3 ms per point.

    Arguments as for ``firing_strengths``, with the name of the output; every point must fire a rule. For a rule base
    the result is within 5e-5 of the exact weighted mean.
    """
    if isinstance(system, FuzzyRuleBase):
        antecedents, consequent = [variable.name for variable in system.antecedents], system.consequent.name
    points = _check_points(points, antecedents)
    with _quiet_lock(), _temporary_system(system) as private:
        simulation = control.ControlSystemSimulation(private, cache=False)
        for name, column in zip(antecedents, points.T, strict=True):
            simulation.input[name] = np.ascontiguousarray(column)
        simulation.compute()
        return np.asarray(simulation.output[consequent], dtype=np.float64)


@contextmanager
def _quiet_lock() -> Iterator[None]:
    """Hold the lock and silence the numpy deprecations that scikit-fuzzy 0.5 triggers by positional ``out``."""
    with _LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@contextmanager
def _private_simulation(system: control.ControlSystem) -> Iterator[control.ControlSystemSimulation]:
    """Give a simulation whose results collide with no other's, and remove them afterwards."""
    simulation = control.ControlSystemSimulation(system, cache=False)
    simulation.unique_id = f"fuzzyroe-{next(_CALLS)}"  # scikit-fuzzy's own key has no simulation in it
    try:
        yield simulation
    finally:
        for antecedent in system.antecedents:
            for term in antecedent.terms.values():
                term.membership_value._sim_data.pop(simulation.unique_id, None)


@contextmanager
def _temporary_system(source: FuzzyRuleBase | control.ControlSystem) -> Iterator[control.ControlSystem]:
    """Give a control system of our own: compute() clears inputs and results that other simulations rely on."""
    system = to_control_system(source) if isinstance(source, FuzzyRuleBase) else copy.deepcopy(source)
    try:
        yield system
    finally:
        # scikit-fuzzy's class-level dictionaries would keep everything that was ever built
        with _LOCK:
            for owner in [*system.graph.nodes, *(part for rule in _rules(system) for part in rule.consequent)]:
                for descriptor in vars(type(owner)).values():
                    if type(descriptor).__name__ == "StatefulProperty":
                        descriptor.data.pop(owner, None)


def _to_antecedent(variable: LinguisticVariable) -> control.Antecedent:
    """Make the variable over a universe of just its breakpoints: linear interpolation between them is then exact."""
    universe = np.unique([*variable.universe, *variable.peaks])
    antecedent = control.Antecedent(universe, variable.name)
    for term, membership in zip(variable.terms, variable.memberships(universe).T, strict=True):
        antecedent[term] = membership
    return antecedent


def _to_consequent(consequent: Consequent, constants: np.ndarray) -> tuple[control.Consequent, Callable[[float], str]]:
    """Make one box per constant, (n,), equally wide and apart; give the variable and the map from value to term."""
    ordered, (lower, upper) = np.unique(constants), consequent.output_range
    ordered = ordered[np.insert(np.diff(ordered) > _SAME_CONSTANT * (upper - lower), 0, True)]
    half = min(_BOX_HALF_WIDTH * (upper - lower), *(np.diff(ordered) / 4)) if len(ordered) > 1 else _BOX_HALF_WIDTH
    edge = half * 1e-4
    boxes = ordered[:, None] + np.array([-half - edge, -half, half, half + edge])
    universe = np.unique([lower - 3 * half, *boxes.ravel(), upper + 3 * half])
    node = control.Consequent(universe, consequent.name)
    node.accumulation_method = np.add
    for index, box in enumerate(boxes):
        node[f"constant_{index}"] = ((universe >= box[1]) & (universe <= box[2])).astype(np.float64)
    return node, lambda value: f"constant_{np.searchsorted(ordered, value, side='right') - 1}"


def _node(nodes: Iterator[Any], name: str, kind: str) -> Any:
    """Find a variable by name."""
    known = {node.label: node for node in nodes}
    if name not in known:
        raise ValueError(f"The system has no {kind} '{name}'; it has {sorted(known)}; use one of these.")
    return known[name]


def _rules(system: control.ControlSystem) -> list[control.Rule]:
    """List the rules by label; ``system.rules`` follows the graph and costs seconds."""
    return sorted(
        (node for node in system.graph.nodes if isinstance(node, control.Rule)), key=lambda rule: str(rule.label)
    )


def _read_variable(node: control.Antecedent) -> LinguisticVariable:
    """Read the peaks of a partition that sums to one."""
    universe = np.asarray(node.universe, dtype=np.float64)
    cores = {label: universe[term.mf >= 1 - 1e-9] for label, term in node.terms.items()}
    if len(cores) < 2 or any(core.size == 0 for core in cores.values()):
        raise ValueError(
            f"'{node.label}' has terms whose largest membership is below 1, or fewer than two terms; each must peak "
            "at a point of the universe; add the peaks to the universe."
        )
    labels = sorted(cores, key=lambda label: cores[label].mean())
    peaks = [cores[labels[0]].max(), *(cores[label].mean() for label in labels[1:-1]), cores[labels[-1]].min()]
    variable = LinguisticVariable(node.label, (universe[0], universe[-1]), tuple(labels), tuple(peaks))
    error = np.abs(variable.memberships(universe) - np.stack([node[label].mf for label in labels], axis=1)).max()
    if error > 1e-9:
        raise ValueError(
            f"The terms of '{node.label}' are not triangles that sum to one (off by {error:.1e}); each must fall to "
            "zero at its neighbours' peaks; reshape them, with the peaks in the universe."
        )
    return variable


def _read_constant(term: Term) -> float:
    """Read the constant of a box or spike: the middle of its core."""
    universe = term.parent.universe
    inside, core = np.flatnonzero(term.mf > 0), universe[term.mf >= term.mf.max() - 1e-9]
    feet = universe[[max(inside[0] - 1, 0), min(inside[-1] + 1, len(universe) - 1)]] if len(inside) else universe
    if np.ptp(feet) > 1e-2 * np.ptp(universe):
        raise ValueError(
            f"The consequent term '{term.label}' is {np.ptp(feet):g} wide; a constant needs a box narrower than 1 % of "
            "the universe; replace the set by a box around its centre."
        )
    return float((core.min() + core.max()) / 2)


def _check_rule(rule: control.Rule, target: control.Consequent) -> Term:
    """Refuse rules outside zero-order TSK; give the consequent term."""
    # rule trees of scikit-fuzzy can express far more than one product of terms with one constant
    parents, weighted = [term.parent.label for term in rule.antecedent_terms], rule.consequent
    problem = None
    if len(weighted) != 1 or weighted[0].term.parent is not target or weighted[0].weight != 1:
        problem = f"has not exactly one unweighted term of '{target.label}' as consequent"
    elif _has_other_than_and(rule.antecedent):
        problem = "uses OR or NOT"
    elif len(set(parents)) < len(parents):
        problem = "names two terms of one antecedent"
    elif len(parents) > 1 and not np.isclose(rule.and_func(0.3, 0.5), 0.15):
        problem = "does not use the product as AND"
    if problem:
        raise ValueError(
            f"Rule '{rule.label}' {problem}; rules 'a is A and b is B ... then constant' with and_func=np.multiply are "
            "allowed; split or rewrite it."
        )
    return weighted[0].term


def _has_other_than_and(condition: Term | TermAggregate) -> bool:
    """Say whether a condition holds OR or NOT anywhere."""
    if not isinstance(condition, TermAggregate):
        return False
    return condition.kind != "and" or any(map(_has_other_than_and, (condition.term1, condition.term2)))


def _check_accumulation(system: control.ControlSystem, target: control.Consequent) -> None:
    """Refuse a maximum of activations where several rules share a consequent term."""
    used = [rule.consequent[0].term.label for rule in _rules(system)]
    if len(set(used)) < len(used) and not np.isclose(target.accumulation_method(0.3, 0.5), 0.8):
        raise ValueError(
            f"Several rules conclude one term of '{target.label}', whose activations are not summed; zero-order TSK "
            "sums them; set accumulation_method = np.add."
        )


def _cells_of(rule: control.Rule, variables: Sequence[LinguisticVariable]) -> list[tuple[int, ...]]:
    """List the cells a rule covers; an antecedent it leaves out is free."""
    terms = {term.parent.label: term.label for term in rule.antecedent_terms}
    choices = [[v.terms.index(terms[v.name])] if v.name in terms else range(len(v.terms)) for v in variables]
    return list(itertools.product(*choices))


def _columns_of(rule: control.Rule, rule_base: FuzzyRuleBase) -> np.ndarray:
    """List the columns of firing strengths that a rule covers."""
    cells = np.array(_cells_of(rule, rule_base.antecedents))  # (cells, D)
    return np.ravel_multi_index(tuple(cells.T), rule_base.shape)


def _check_points(points: np.ndarray, antecedents: Sequence[str]) -> np.ndarray:
    """Refuse points that scikit-fuzzy would misread: it drops nan silently."""
    points, count = np.asarray(points, dtype=np.float64), len(antecedents)
    if not count or points.ndim != 2 or points.shape[1] != count or not np.isfinite(points).all():
        found = f"points have shape {points.shape} for the antecedents {antecedents}"
        raise ValueError(f"{found}; finite (n, D) points and one name per column are allowed; correct them.")
    return points
