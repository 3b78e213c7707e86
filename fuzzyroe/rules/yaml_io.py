"""The YAML form of a rule base, schema ``fuzzy-rule-base/1``.

A rule is a row ``[term, ..., term, consequent]``, one term per antecedent in their order, or ``any``; the comment
behind it stays with it. A completed or fitted rule base adds the origin of each cell, ``[..., consequent,
interpolated]``, and for fitted cells what they were fitted from, ``[..., consequent, fitted, prior, expert]``. Numbers
are written so that they read back as the same doubles.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from fuzzyroe.rules.interpolation import InterpolationOptions
from fuzzyroe.rules.rule_base import NO_RULE, SOURCES, FuzzyRuleBase
from fuzzyroe.rules.variable import ANY_TERM, Consequent, LinguisticVariable
from fuzzyroe.rules.yaml_nodes import NodeReader

SCHEMA = "fuzzy-rule-base/1"
SYSTEM = {"type": "tsk", "order": 0, "t_norm": "product", "defuzzification": "weighted_average"}

_REQUIRED = ("schema", "name", "system", "antecedents", "consequent", "rules")
_OPTIONAL = ("description", "interpolation", "defaults", "provenance")


def shipped_rule_bases() -> tuple[str, ...]:
    """Name the rule bases that come with the package."""
    folder = resources.files("fuzzyroe.rules") / "bases"
    return tuple(sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_rule_base(name_or_path: str | os.PathLike[str]) -> FuzzyRuleBase:
    """Load a shipped rule base by name or any other by path.

    Args:
        name_or_path: A name such as ``"default"``, or a path: anything with a folder or an ending.

    Returns:
        The rule base as written; call ``interpolate()`` to complete it.

    Raises:
        KeyError: If no rule base of that name is shipped.
        FileNotFoundError: If there is no such file.
        ValueError: If the file breaks the schema, with file, line and remedy.
    """
    path = Path(name_or_path)
    if isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix:
        if name_or_path not in shipped_rule_bases():
            raise KeyError(
                f"No rule base '{name_or_path}' is shipped; known: {list(shipped_rule_bases())}; use one of these, or "
                "a path ending in .yaml."
            )
        file = resources.files("fuzzyroe.rules") / "bases" / f"{name_or_path}.yaml"
        return parse_rule_base(file.read_text(encoding="utf-8"), f"{name_or_path}.yaml")
    return parse_rule_base(path.read_text(encoding="utf-8"), str(path))


def save_rule_base(rule_base: FuzzyRuleBase, path: str | os.PathLike[str]) -> None:
    """Write a rule base so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(dump_rule_base(rule_base))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def parse_rule_base(text: str, origin: str = "<text>") -> FuzzyRuleBase:
    """Read a rule base from YAML text.

    Args:
        text: The document.
        origin: Name of the file, for messages.

    Raises:
        ValueError: If the text breaks the schema, with file, line and remedy.
    """
    reader = NodeReader(origin)
    root = reader.parse(text)
    entries = reader.mapping(root, "the rule base", _REQUIRED, _OPTIONAL)
    _check_constants(reader, entries)
    antecedents = tuple(
        _read_antecedent(reader, node) for node in reader.sequence(entries["antecedents"], "antecedents")
    )
    consequent = _read_consequent(reader, entries["consequent"])
    arrays = _read_rules(reader, entries["rules"], antecedents, consequent)
    options: dict[str, Any] = {}
    if "description" in entries:
        options["description"] = reader.text(entries["description"], "description")
    if "interpolation" in entries:
        options["interpolation"] = _read_interpolation(reader, entries["interpolation"])
    if "defaults" in entries:
        options["non_finite"] = _read_defaults(reader, entries["defaults"])
    if "provenance" in entries:
        reader.mapping(entries["provenance"], "provenance", optional=None)
        options["provenance"] = reader.plain(entries["provenance"], "provenance")
    name = reader.text(entries["name"], "name")
    return _located(reader, root, FuzzyRuleBase, name, antecedents, consequent=consequent, **arrays, **options)


def dump_rule_base(rule_base: FuzzyRuleBase) -> str:
    """Write a rule base as YAML text that parses to an equal one."""
    head: dict[str, Any] = {"schema": SCHEMA, "name": rule_base.name}
    if rule_base.description:
        head["description"] = rule_base.description
    lines = [yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=10**6).rstrip()]
    lines += [f"system: {_flow(SYSTEM)}", "antecedents:  # their order is the order of the columns of `rules`"]
    for variable in rule_base.antecedents:
        entry = {"name": variable.name, "universe": list(variable.universe)}
        entry["terms"] = dict(zip(variable.terms, variable.peaks, strict=True))
        lines.append(f"  - {_flow(entry | {'monotone': variable.monotone})}")
    consequent = rule_base.consequent
    rescale = None if consequent.rescale is None else list(consequent.rescale)
    lines.append(
        f"consequent: {_flow({'name': consequent.name, 'universe': list(consequent.universe), 'rescale': rescale})}"
    )
    lines.append(f"interpolation: {_flow(vars(rule_base.interpolation))}")
    lines.append(f"defaults: {_flow({'non_finite': float(rule_base.non_finite), 'out_of_range': 'clip'})}")
    lines.append(
        f"rules:  # {', '.join(v.name for v in rule_base.antecedents)}, {consequent.name}, then origin and prior"
    )
    lines += _rows(rule_base)
    if rule_base.provenance:
        provenance = {"provenance": dict(rule_base.provenance)}
        lines.append(yaml.safe_dump(provenance, default_flow_style=None, sort_keys=False, allow_unicode=True).rstrip())
    return "\n".join(lines) + "\n"


def _rows(rule_base: FuzzyRuleBase) -> list[str]:
    """Write the rows of all cells with a rule; the origin is left out when all are the expert's."""
    rows, all_expert = [], set(rule_base.source.ravel().tolist()) <= {"expert", NO_RULE}
    for cell in rule_base.cells():
        if np.isnan(rule_base.table[cell]):
            continue
        terms = rule_base.terms_of(cell)
        row: list[Any] = [*terms, float(rule_base.table[cell])]
        if not all_expert:
            row.append(str(rule_base.source[cell]))
        if rule_base.source[cell] == "fitted":
            row += [float(rule_base.prior_table[cell]), str(rule_base.prior_source[cell])]
        comment = rule_base.comments.get(terms)
        rows.append(f"  - {_flow(row)}" + (f"  # {comment}" if comment else ""))
    return rows


def _flow(value: Any) -> str:
    """Write a value on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6).strip()


def _located(reader: NodeReader, node: yaml.Node, make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a constructor; give its refusal the place in the file."""
    try:
        return make(*args, **kwargs)
    except KeyError as error:
        raise ValueError(f"{reader.where(node)}: {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{reader.where(node)}: {error}") from error


def _check_constants(reader: NodeReader, entries: dict[str, yaml.Node]) -> None:
    """Refuse another schema or another kind of system."""
    schema = reader.text(entries["schema"], "schema")
    if schema != SCHEMA:
        reader.refuse(entries["schema"], f"schema is '{schema}'", f"'{SCHEMA}' is allowed", "convert the file")
    for key, node in reader.mapping(entries["system"], "system", SYSTEM).items():
        value = reader.plain(node, f"system.{key}")
        if value != SYSTEM[key]:
            reader.refuse(
                node, f"system.{key} is {value!r}", f"{SYSTEM[key]!r} is allowed", "use that; no other is inferred"
            )


def _read_antecedent(reader: NodeReader, node: yaml.Node) -> LinguisticVariable:
    """Read one variable; a term is its peak, or a triangle [foot, peak, foot] that meets its neighbours."""
    entries = reader.mapping(node, "an antecedent", ("name", "universe", "terms"), ("monotone",))
    name = reader.text(entries["name"], "the name of an antecedent")
    shapes: dict[str, float | list[float]] = {}
    term_nodes = reader.mapping(entries["terms"], f"the terms of '{name}'", optional=None)
    for term, term_node in term_nodes.items():
        what = f"term '{term}' of '{name}'"
        if isinstance(term_node, yaml.SequenceNode):
            shapes[term] = [reader.number(point, what) for point in reader.sequence(term_node, what, 3)]
        else:
            shapes[term] = reader.number(term_node, what)
    has_direction = "monotone" in entries and not reader.is_null(entries["monotone"])
    monotone = reader.text(entries["monotone"], "monotone") if has_direction else None
    peaks = [shape[1] if isinstance(shape, list) else shape for shape in shapes.values()]
    universe = reader.interval(entries["universe"], f"the universe of '{name}'")
    variable = _located(reader, node, LinguisticVariable, name, universe, tuple(shapes), tuple(peaks), monotone)
    for index, (term, shape) in enumerate(shapes.items()):
        if isinstance(shape, list):
            _check_triangle(reader, term_nodes[term], variable, index, shape)
    return variable


def _check_triangle(
    reader: NodeReader, node: yaml.Node, variable: LinguisticVariable, index: int, shape: list[float]
) -> None:
    """Refuse a triangle that leaves a gap to a neighbouring peak or overlaps it: memberships must sum to one."""
    what = f"term '{variable.terms[index]}' of '{variable.name}'"
    sides = [(-1, shape[0], "left"), (1, shape[2], "right")]
    for step, foot, side in sides:
        if not 0 <= index + step < len(variable.peaks):
            continue  # outside the outer peaks the term is a shoulder whatever its foot
        peak = variable.peaks[index + step]
        if not np.isclose(foot, peak, rtol=0, atol=1e-9):
            kind = "a gap" if (foot - peak) * step < 0 else "an overlap"
            found = f"{what} ends on the {side} at {foot:g}, which leaves {kind}"
            allowed = f"the peak {peak:g} of its neighbour is allowed"
            reader.refuse(node, found, allowed, "end it there, or give only its peak")


def _read_consequent(reader: NodeReader, node: yaml.Node) -> Consequent:
    entries = reader.mapping(node, "the consequent", ("name", "universe"), ("rescale",))
    has_rescale = "rescale" in entries and not reader.is_null(entries["rescale"])
    rescale = reader.interval(entries["rescale"], "the rescale range") if has_rescale else None
    universe = reader.interval(entries["universe"], "the universe of the consequent")
    return _located(reader, node, Consequent, reader.text(entries["name"], "its name"), universe, rescale)


def _read_interpolation(reader: NodeReader, node: yaml.Node) -> InterpolationOptions:
    entries = reader.mapping(node, "interpolation", ("method",), ("selection", "fallback", "monotone"))
    options: dict[str, Any] = {key: reader.text(entries[key], key) for key in entries if key != "monotone"}
    if "monotone" in entries:
        options["monotone"] = reader.truth(entries["monotone"], "interpolation.monotone")
    return _located(reader, node, InterpolationOptions, **options)


def _read_defaults(reader: NodeReader, node: yaml.Node) -> float:
    entries = reader.mapping(node, "defaults", ("non_finite",), ("out_of_range",))
    if "out_of_range" in entries and reader.text(entries["out_of_range"], "out_of_range") != "clip":
        reader.refuse(entries["out_of_range"], "out_of_range is not 'clip'", "'clip' is allowed", "use 'clip'")
    return reader.number(entries["non_finite"], "non_finite")


def _read_rules(
    reader: NodeReader, node: yaml.Node, antecedents: tuple[LinguisticVariable, ...], consequent: Consequent
) -> dict[str, Any]:
    """Read the rows into the arrays of a rule base, with their comments."""
    shape = tuple(len(variable.terms) for variable in antecedents)
    arrays = {"table": np.full(shape, np.nan), "source": np.full(shape, NO_RULE, dtype="U16")}
    arrays |= {f"prior_{key}": array.copy() for key, array in arrays.items()}
    comments: dict[tuple[str, ...], str] = {}
    first_line: dict[tuple[int, ...], int] = {}
    for row in reader.sequence(node, "rules"):
        cells, value, source, prior, prior_source = _read_row(reader, row, antecedents, consequent)
        comment = reader.comment_after(row)
        for cell in cells:
            terms = tuple(variable.terms[k] for variable, k in zip(antecedents, cell, strict=True))
            if cell in first_line:
                _refuse_second_rule(reader, row, terms, first_line[cell], arrays["table"][cell], value)
            first_line[cell] = row.start_mark.line + 1
            if comment:
                comments[terms] = comment
            arrays["table"][cell], arrays["source"][cell] = value, source
            arrays["prior_table"][cell], arrays["prior_source"][cell] = prior, prior_source
    kept = arrays if "fitted" in arrays["source"] else {key: arrays[key] for key in ("table", "source")}
    return {**kept, "comments": comments}


def _read_row(
    reader: NodeReader, row: yaml.Node, antecedents: tuple[LinguisticVariable, ...], consequent: Consequent
) -> tuple[list[tuple[int, ...]], float, str, float, str]:
    """Read one rule: its cells, consequent, origin, prior and origin of the prior."""
    entries, num_terms = reader.sequence(row, "a rule"), len(antecedents)
    extra = len(entries) - num_terms
    if extra not in (1, 2, 4):
        allowed = (
            f"{num_terms} terms and a consequent are allowed, then possibly an origin, and for fitted rules the prior "
            "with its origin"
        )
        reader.refuse(row, f"a rule has {len(entries)} entries", allowed, "add or remove entries")
    choices = [_read_term(reader, *pair) for pair in zip(entries[:num_terms], antecedents, strict=True)]
    values = [_read_value(reader, entries[num_terms + offset], consequent) for offset in range(0, extra, 2)]
    origins = [reader.text(entries[num_terms + offset], "the origin of a rule") for offset in range(1, extra, 2)]
    source = origins[0] if origins else "expert"
    if any(name not in SOURCES for name in origins) or (source == "fitted") != (extra == 4) or "fitted" in origins[1:]:
        allowed = "expert, interpolated, or fitted with a prior and its origin (expert or interpolated) are allowed"
        reader.refuse(row, f"a rule has the origins {origins}", allowed, "correct the row")
    # a cell that was not fitted is its own prior
    return list(itertools.product(*choices)), values[0], source, values[-1], origins[-1] if origins else source


def _read_term(reader: NodeReader, node: yaml.Node, variable: LinguisticVariable) -> range | list[int]:
    """Read a term into its index, or ``any`` into all indices."""
    term = reader.text(node, f"a term of '{variable.name}'")
    if term == ANY_TERM:
        return range(len(variable.terms))
    if term not in variable.terms:
        known = [*variable.terms, ANY_TERM]
        reader.refuse(node, f"'{variable.name}' has no term '{term}'", f"{known} are allowed", "correct the term")
    return [variable.terms.index(term)]


def _read_value(reader: NodeReader, node: yaml.Node, consequent: Consequent) -> float:
    value = reader.number(node, "a consequent")
    if not consequent.contains(value):
        allowed = f"values in {list(consequent.universe)} are allowed"
        reader.refuse(node, f"the consequent {value:g} is outside its universe", allowed, "correct or widen it")
    return value


def _refuse_second_rule(
    reader: NodeReader, row: yaml.Node, terms: tuple[str, ...], line: int, first: float, second: float
) -> NoReturn:
    if first == second:
        found = f"this rule repeats the rule of line {line} for {terms}"
    else:
        found = f"this rule ({second:g}) conflicts with the rule of line {line} ({first:g}) for {terms}"
    reader.refuse(row, found, "one rule per combination is allowed", "remove one of the two")
