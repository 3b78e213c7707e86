"""The YAML form of a rule base, schema ``fuzzy-rule-base/1``.

A rule is a row ``[term, ..., term, consequent]``, one term per antecedent in their order, or ``any``; the comment
behind it stays with it. A completed or fitted rule base adds the origin of each cell, ``[..., consequent,
interpolated]``, and for fitted cells what they were fitted from, ``[..., consequent, fitted, prior, expert]``. Numbers
are written so that they read back as the same doubles. Reading is strict: every refusal names file, line and remedy.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fuzzyroe.files import atomic_write
from fuzzyroe.rules.interpolation import InterpolationOptions
from fuzzyroe.rules.rule_base import NO_RULE, SOURCES, FuzzyRuleBase
from fuzzyroe.rules.variable import ANY_TERM, Consequent, LinguisticVariable

SCHEMA = "fuzzy-rule-base/1"
SYSTEM = {"type": "tsk", "order": 0, "t_norm": "product", "defuzzification": "weighted_average"}

_BASES = resources.files("fuzzyroe.rules") / "bases"
_KINDS = {"str": "text", "int": "a number", "float": "a number", "bool": "a truth value", "null": "null"}

Made = TypeVar("Made")
Reader = Any  # Callable[[Entry, str], Any], which gives a value, or the one value that is allowed


def shipped_rule_bases() -> tuple[str, ...]:
    """Name the rule bases that come with the package."""
    return tuple(sorted(Path(entry.name).stem for entry in _BASES.iterdir() if entry.name.endswith(".yaml")))


def load_rule_base(name_or_path: str | os.PathLike[str]) -> FuzzyRuleBase:
    """Load a shipped rule base by name or any other by path, as written; ``interpolate()`` completes it.

    >>> rule_base = load_rule_base("default")
    >>> [variable.name for variable in rule_base.antecedents]
    ['image_dispersion', 'text_dispersion', 'question_length']
    >>> len(rule_base.missing_cells()), rule_base.num_rules
    (12, 27)

    Args:
        name_or_path: A name such as ``"default"``, or a path: anything with a folder or an extension.

    Raises:
        KeyError: If no rule base of that name is shipped.
        FileNotFoundError: If there is no such file.
        ValueError: If the file breaks the schema, with file, line and remedy.
    """
    path = Path(name_or_path)
    # a bare word is a shipped name, never a file: what it means must not depend on the working directory
    if isinstance(name_or_path, str) and path.name == name_or_path and not path.suffix:
        if name_or_path not in shipped_rule_bases():
            raise KeyError(
                f"No rule base '{name_or_path}' is shipped; known: {list(shipped_rule_bases())}; use one of these, or "
                "a path ending in .yaml."
            )
        file = f"{name_or_path}.yaml"
        return parse_rule_base((_BASES / file).read_text(encoding="utf-8"), file)
    return parse_rule_base(path.read_text(encoding="utf-8"), str(path))


def save_rule_base(rule_base: FuzzyRuleBase, path: str | os.PathLike[str]) -> None:
    """Write a rule base so that a reader sees the old file or the new one, never a part."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(dump_rule_base(rule_base), encoding="utf-8")


def parse_rule_base(text: str, origin: str = "<text>") -> FuzzyRuleBase:
    """Read a rule base from YAML text.

    Args:
        text: The document.
        origin: Name of the file, for messages.

    Raises:
        ValueError: If the text breaks the schema, with file, line and remedy.
    """
    root = Entry.of_document(text, origin)
    values = root.fields("", _REQUIRED, _OPTIONAL)
    antecedents, consequent = tuple(values["antecedents"]), values["consequent"]
    # rules are read last: they are checked against the variables
    options = _read_rules(values["rules"], antecedents, consequent)
    options |= {key: values[key] for key in ("description", "interpolation", "provenance") if key in values}
    if "defaults" in values:
        options["non_finite"] = values["defaults"]["non_finite"]
    return root.make(FuzzyRuleBase, values["name"], antecedents, consequent=consequent, **options)


def dump_rule_base(rule_base: FuzzyRuleBase) -> str:
    """Write a rule base as YAML text that parses to an equal one."""
    consequent = rule_base.consequent
    document = CommentedMap(schema=SCHEMA, name=rule_base.name)
    if rule_base.description:
        document["description"] = rule_base.description
    document["system"] = SYSTEM
    document["antecedents"] = [
        _on_one_line(
            name=variable.name,
            universe=list(variable.universe),
            terms=dict(zip(variable.terms, variable.peaks, strict=True)),
            monotone=variable.monotone,
        )
        for variable in rule_base.antecedents
    ]
    rescale = None if consequent.rescale is None else list(consequent.rescale)
    document["consequent"] = _on_one_line(name=consequent.name, universe=list(consequent.universe), rescale=rescale)
    document["interpolation"] = vars(rule_base.interpolation)
    document["defaults"] = {"non_finite": float(rule_base.non_finite), "out_of_range": "clip"}
    document["rules"] = _rows(rule_base)
    if rule_base.provenance:
        document["provenance"] = dict(rule_base.provenance)
    names = ", ".join([*(variable.name for variable in rule_base.antecedents), consequent.name])
    document.yaml_add_eol_comment("# their order is the order of the columns of `rules`", "antecedents")
    document.yaml_add_eol_comment(f"# {names}, then origin and prior", "rules")
    yaml, stream = YAML(), io.StringIO()
    yaml.version = (1, 1)  # puts words in quotes that either version reads as something else
    yaml.default_flow_style = None  # lists of scalars stand on one line
    yaml.width = 10**6
    yaml.indent(sequence=4, offset=2)
    # a reader refuses aliases, so values that occur twice are written twice
    yaml.representer.ignore_aliases = lambda data: True
    yaml.dump(document, stream)
    return stream.getvalue().removeprefix("%YAML 1.1\n---\n")


def _rows(rule_base: FuzzyRuleBase) -> CommentedSeq:
    """Write the rows of all cells with a rule; the origin is left out when all are the expert's."""
    rows, all_expert = CommentedSeq(), set(rule_base.source.ravel().tolist()) <= {"expert", NO_RULE}
    for cell in map(tuple, np.argwhere(~np.isnan(rule_base.table))):
        terms, source = rule_base.terms_of(cell), str(rule_base.source[cell])
        row: list[Any] = [*terms, float(rule_base.table[cell]), *([] if all_expert else [source])]
        if rule_base.prior_table is not None and rule_base.prior_source is not None and source == "fitted":
            row += [float(rule_base.prior_table[cell]), str(rule_base.prior_source[cell])]
        rows.append(row)
        if rule_base.comments.get(terms):
            rows.yaml_add_eol_comment(f"# {rule_base.comments[terms]}", len(rows) - 1)
    return rows


def _on_one_line(**entries: Any) -> CommentedMap:
    mapping = CommentedMap(entries)
    mapping.fa.set_flow_style()
    return mapping


@dataclass(frozen=True)
class Entry:
    """A value of a document that knows its place, for refusals.

    Attributes:
        node: The value as ruamel.yaml composes it: its type by YAML, the text as written, where it begins and ends.
        file: Name of the file.
        lines: Its lines.
    """

    node: Node
    file: str
    lines: list[str]

    @classmethod
    def of_document(cls, text: str, file: str) -> Entry:
        """Give the root of a text that is one YAML document without anchors and aliases."""
        try:
            # a few nested aliases stand for more values than fit into memory
            for event in YAML(typ="safe", pure=True).parse(text):
                if getattr(event, "anchor", None) is not None:
                    raise ValueError(
                        f"{file}:{event.start_mark.line + 1}: the anchor or alias '{event.anchor}'; values that are "
                        "written out are allowed; write the value in each of its places."
                    )
            root = YAML(typ="safe", pure=True).compose(text)
        except YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or "an unreadable character"
            where = f"{file}:{mark.line + 1 if mark else 1}"
            raise ValueError(f"{where}: {problem}; one YAML document is allowed; correct the syntax.") from error
        if root is None:
            raise ValueError(f"{file}:1: the file is empty; one YAML document is allowed; write a rule base.")
        return cls(root, file, text.splitlines())

    @property
    def kind(self) -> str:
        """A value of ``_KINDS``, or anything else for what is none of them."""
        if not isinstance(self.node, ScalarNode):
            return "a list or mapping"
        tag, text = str(self.node.tag).rpartition(":")[2], self.node.value.lower()
        # other tools still read YAML 1.1, where these words are truth values and such numbers are text
        is_switch = not self.node.style and text in ("yes", "no", "on", "off")
        lacks_point = tag == "float" and "e" in text and "." not in text
        return "ambiguous" if is_switch or lacks_point else _KINDS.get(tag, tag)

    @property
    def line(self) -> int:
        """Line where it begins, from 1."""
        return self.node.start_mark.line + 1

    @property
    def comment(self) -> str:
        """Comment behind a list in brackets; a list in lines of its own ends where the next item begins."""
        end, is_bracketed = self.node.end_mark, isinstance(self.node, SequenceNode) and self.node.flow_style
        rest = self.lines[end.line][end.column :].strip() if is_bracketed and end.line < len(self.lines) else ""
        return rest[1:].strip() if rest.startswith("#") else ""

    def refuse(self, found: str, allowed: str, remedy: str) -> NoReturn:
        """Raise the three-part error with file and line."""
        raise ValueError(f"{self.file}:{self.line}: {found}; {allowed}; {remedy}.")

    def make(self, constructor: Callable[..., Made], *args: Any, **kwargs: Any) -> Made:
        """Call a constructor; give its refusal the place in the file."""
        try:
            return constructor(*args, **kwargs)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{self.file}:{self.line}: {error.args[0]}") from error

    def mapping(
        self, what: str, required: Collection[str] = (), optional: Collection[str] | None = None
    ) -> dict[str, Entry]:
        """Read a mapping, each key once, in the order of the file: the keys it must and may have (None for any)."""
        if not isinstance(self.node, MappingNode):
            self.refuse(f"{what} is not a mapping", "'key: value' entries are allowed", "write it as a mapping")
        entries: dict[str, Entry] = {}
        known = [*required, *(optional or ())]
        for key_node, value_node in self.node.value:
            key = replace(self, node=key_node)
            name = key.text(f"a key of {what}")
            if name in entries:
                key.refuse(f"{what} has the key '{name}' twice", "one is allowed", "remove one")
            if optional is not None and name not in known:
                key.refuse(f"{what} has the unknown key '{name}'", f"{known} are allowed", "rename or remove it")
            entries[name] = replace(self, node=value_node)
        missing = [key for key in required if key not in entries]
        if missing:
            self.refuse(f"{what} lacks {missing}", f"{list(required)} are required", "add what is missing")
        return entries

    def fields(
        self, what: str, required: Mapping[str, Reader], optional: Mapping[str, Reader] | None = None
    ) -> dict[str, Any]:
        """Read a mapping with known keys, each by its reader; null for an optional key counts as absent."""
        readers, values = {**required, **(optional or {})}, {}
        for key, entry in self.mapping(what or "the rule base", required, optional or {}).items():
            if key in required or entry.kind != "null":
                reader, name = readers[key], f"{what}.{key}".lstrip(".")
                values[key] = reader(entry, name) if callable(reader) else entry.plain(name)
                if not callable(reader) and values[key] != reader:
                    allowed = f"{reader!r} is allowed"
                    entry.refuse(f"{name} is {values[key]!r}", allowed, "use that; nothing else is implemented")
        return values

    def sequence(self, what: str, length: int | None = None) -> list[Entry]:
        """Read a list, of a certain length if one is given."""
        if not isinstance(self.node, SequenceNode):
            self.refuse(f"{what} is not a list", "a list '[...]' is allowed", "write it as a list")
        if length is not None and len(self.node.value) != length:
            self.refuse(f"{what} has {len(self.node.value)} entries", f"{length} are allowed", "add or remove entries")
        return [replace(self, node=node) for node in self.node.value]

    def text(self, what: str) -> str:
        """Read a text."""
        return self._scalar(what, "text", "put it in quotes")

    def truth(self, what: str) -> bool:
        """Read true or false."""
        return self._scalar(what, "a truth value", "write true or false")

    def number(self, what: str) -> float:
        """Read a finite number."""
        value = float(self._scalar(what, "a number", "write it with a point, such as 1.0e-3"))
        if not math.isfinite(value):
            self.refuse(f"{what} is {value}", "a finite number is allowed", "replace it")
        return value

    def interval(self, what: str) -> tuple[float, float]:
        """Read two numbers."""
        lower, upper = self.sequence(what, 2)
        return lower.number(what), upper.number(what)

    def plain(self, what: str) -> Any:
        """Read anything: mappings, lists, texts, numbers, truth values and null; dates stay text."""
        if isinstance(self.node, MappingNode):
            return {key: entry.plain(f"{what}.{key}") for key, entry in self.mapping(what).items()}
        if isinstance(self.node, SequenceNode):
            return [entry.plain(what) for entry in self.sequence(what)]
        if self.kind in ("a number", "a truth value", "null"):
            return YAML(typ="safe", pure=True).constructor.construct_object(self.node)
        return self.node.value

    def _scalar(self, what: str, kind: str, remedy: str) -> Any:
        """Read a value of one kind."""
        if self.kind != kind:
            shown = f"'{self.node.value}'" if isinstance(self.node, ScalarNode) else self.kind
            self.refuse(f"{what} is {shown}, which YAML does not read as {kind}", f"{kind} is allowed", remedy)
        return self.plain(what)


def _read_antecedent(entry: Entry, what: str) -> LinguisticVariable:
    """Read one variable; a term is its peak, or a triangle [foot, peak, foot] that meets its neighbours."""
    required = {"name": Entry.text, "universe": Entry.interval, "terms": Entry.mapping}
    values = entry.fields(what, required, {"monotone": Entry.text})
    name, terms, shapes = values["name"], values.pop("terms"), []
    for term, shape in terms.items():
        what = f"term '{term}' of '{name}'"
        is_triangle = isinstance(shape.node, SequenceNode)
        shapes.append([point.number(what) for point in (shape.sequence(what, 3) if is_triangle else [shape])])
    peaks = tuple(shape[len(shape) // 2] for shape in shapes)
    variable = entry.make(LinguisticVariable, terms=tuple(terms), peaks=peaks, **values)
    for index, (term, points) in enumerate(zip(terms, shapes, strict=True)):
        for step, side in ((-1, "left"), (1, "right")):
            # outside the outer peaks the term is a shoulder whatever its foot
            if len(points) == 1 or not 0 <= index + step < len(peaks):
                continue
            foot, peak = points[1 + step], peaks[index + step]
            if not math.isclose(foot, peak, rel_tol=0, abs_tol=1e-9):  # memberships must sum to one
                kind = "a gap" if (foot - peak) * step < 0 else "an overlap"
                found = f"term '{term}' of '{name}' ends on the {side} at {foot:g}, which leaves {kind}"
                allowed = f"the peak {peak:g} of its neighbour is allowed"
                terms[term].refuse(found, allowed, "end it there, or give only its peak")
    return variable


def _object(constructor: Callable[..., Any], required: dict[str, Reader], optional: dict[str, Reader]) -> Reader:
    """Make a reader of a mapping whose keys are arguments of a constructor."""
    return lambda entry, what: entry.make(constructor, **entry.fields(what, required, optional))


_REQUIRED: dict[str, Reader] = {
    "schema": SCHEMA,
    "name": Entry.text,
    "system": lambda entry, what: entry.fields(what, SYSTEM),
    "antecedents": lambda entry, what: [_read_antecedent(item, what) for item in entry.sequence(what)],
    "consequent": _object(Consequent, {"name": Entry.text, "universe": Entry.interval}, {"rescale": Entry.interval}),
    "rules": Entry.sequence,
}
_OPTIONAL: dict[str, Reader] = {
    "description": Entry.text,
    "interpolation": _object(
        InterpolationOptions,
        {"method": Entry.text},
        {"selection": Entry.text, "fallback": Entry.text, "monotone": Entry.truth},
    ),
    "defaults": lambda entry, what: entry.fields(what, {"non_finite": Entry.number}, {"out_of_range": "clip"}),
    "provenance": lambda entry, what: entry.mapping(what) and entry.plain(what),
}


def _read_rules(
    rows: list[Entry], antecedents: tuple[LinguisticVariable, ...], consequent: Consequent
) -> dict[str, Any]:
    """Read the rows into the arrays of a rule base, with their comments."""
    shape = tuple(len(variable.terms) for variable in antecedents)
    # priors are collected for every row, and dropped at the end if nothing was fitted
    arrays: dict[str, np.ndarray] = {"table": np.full(shape, np.nan), "source": np.full(shape, NO_RULE, dtype="U16")}
    arrays |= {f"prior_{key}": array.copy() for key, array in arrays.items()}
    comments: dict[tuple[str, ...], str] = {}
    lines: dict[tuple[int, ...], int] = {}
    for row in rows:
        cells, values = _read_row(row, antecedents, consequent)
        for cell in cells:
            terms = tuple(variable.terms[k] for variable, k in zip(antecedents, cell, strict=True))
            if cell in lines:  # two rows for one cell, maybe through "any"
                first, value = float(arrays["table"][cell]), values[0]
                found = f"this rule ({value:g}) conflicts with the rule of line {lines[cell]} ({first:g}) for {terms}"
                if first == value:
                    found = f"this rule repeats the rule of line {lines[cell]} for {terms}"
                row.refuse(found, "one rule per combination is allowed", "remove one of the two")
            lines[cell] = row.line
            if row.comment:
                comments[terms] = row.comment
            for array, part in zip(arrays.values(), values, strict=True):
                array[cell] = part
    kept = arrays if "fitted" in arrays["source"] else {key: arrays[key] for key in ("table", "source")}
    return {**kept, "comments": comments}


def _read_row(
    row: Entry, antecedents: tuple[LinguisticVariable, ...], consequent: Consequent
) -> tuple[list[tuple[int, ...]], tuple[float, str, float, str]]:
    """Read one rule: its cells, and its consequent, origin, prior and origin of the prior."""
    entries, num_terms = row.sequence("a rule"), len(antecedents)
    extra = len(entries) - num_terms
    if extra not in (1, 2, 4):
        allowed = (
            f"{num_terms} terms and a consequent are allowed, then possibly an origin, and for fitted rules the prior "
            "with its origin"
        )
        row.refuse(f"a rule has {len(entries)} entries", allowed, "add or remove entries")
    choices: list[list[int]] = []
    for entry, variable in zip(entries[:num_terms], antecedents, strict=True):
        term, known = entry.text(f"a term of '{variable.name}'"), [*variable.terms, ANY_TERM]
        if term not in known:
            entry.refuse(f"'{variable.name}' has no term '{term}'", f"{known} are allowed", "correct the term")
        choices.append([k for k, name in enumerate(variable.terms) if term in (name, ANY_TERM)])
    values = [entry.number("a consequent") for entry in entries[num_terms::2]]
    for value in values:
        if not consequent.contains(value):
            allowed = f"values in {list(consequent.universe)} are allowed"
            row.refuse(f"the consequent {value:g} is outside its universe", allowed, "correct or widen it")
    origins = [entry.text("the origin of a rule") for entry in entries[num_terms + 1 :: 2]] or ["expert"]
    is_fitted = [origin == "fitted" for origin in origins]
    if not set(origins) <= set(SOURCES) or is_fitted != [True, False][-len(origins) :]:
        allowed = "expert, interpolated, or fitted with a prior and its origin (expert or interpolated) are allowed"
        row.refuse(f"a rule has the origins {origins}", allowed, "correct the row")
    # a cell that was not fitted is its own prior
    return list(itertools.product(*choices)), (values[0], origins[0], values[-1], origins[-1])
