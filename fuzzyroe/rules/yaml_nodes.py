"""Strict reading of YAML nodes: every refusal names the file, the line, what was found and what to do.

``yaml.safe_load`` keeps the last of two equal keys without a word, forgets where a value stood and drops comments,
hence this reader.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NoReturn

import yaml

_TAG = "tag:yaml.org,2002:"


class NodeReader:
    """Reads the nodes of one YAML document.

    Attributes:
        origin: Name of the file, for messages.
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self._lines: list[str] = []

    def parse(self, text: str) -> yaml.Node:
        """Parse a text into its root node.

        Raises:
            ValueError: If the text is no YAML, or holds nothing or several documents.
        """
        self._lines = text.splitlines()
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else 1
            problem = getattr(error, "problem", None) or "an unreadable character"
            raise ValueError(
                f"{self.origin}:{line}: {problem}; one YAML document is allowed; correct the syntax."
            ) from error
        if root is None:
            raise ValueError(f"{self.origin}:1: the file is empty; one YAML document is allowed; write a rule base.")
        return root

    def refuse(self, node: yaml.Node, found: str, allowed: str, remedy: str) -> NoReturn:
        """Raise the three-part error with file and line."""
        raise ValueError(f"{self.where(node)}: {found}; {allowed}; {remedy}.")

    def where(self, node: yaml.Node) -> str:
        """Give ``file:line`` of a node."""
        return f"{self.origin}:{node.start_mark.line + 1}"

    def comment_after(self, node: yaml.Node) -> str:
        """Give the comment behind a list or mapping in brackets, on the line where it ends; empty if there is none."""
        end, is_bracketed = node.end_mark, getattr(node, "flow_style", False)
        rest = self._lines[end.line][end.column :].strip() if is_bracketed and end.line < len(self._lines) else ""
        return rest[1:].strip() if rest.startswith("#") else ""

    def mapping(
        self, node: yaml.Node, what: str, required: Collection[str] = (), optional: Collection[str] | None = ()
    ) -> dict[str, yaml.Node]:
        """Read a mapping with known keys, each once.

        Args:
            node: The node.
            what: Its name for messages.
            required: Keys that must be there.
            optional: Keys that may be there; None for any.

        Returns:
            Value nodes by key, in the order of the file.
        """
        if not isinstance(node, yaml.MappingNode):
            self.refuse(node, f"{what} is not a mapping", "'key: value' entries are allowed", "write it as a mapping")
        entries: dict[str, yaml.Node] = {}
        known = None if optional is None else [*required, *optional]
        for key_node, value_node in node.value:
            key = self.text(key_node, f"a key of {what}")
            if key in entries:
                self.refuse(key_node, f"{what} has the key '{key}' twice", "one is allowed", "remove one")
            if known is not None and key not in known:
                self.refuse(
                    key_node, f"{what} has the unknown key '{key}'", f"{known} are allowed", "rename or remove it"
                )
            entries[key] = value_node
        missing = [key for key in required if key not in entries]
        if missing:
            self.refuse(node, f"{what} lacks {missing}", f"{list(required)} are required", "add what is missing")
        return entries

    def sequence(self, node: yaml.Node, what: str, length: int | None = None) -> list[yaml.Node]:
        """Read a list, of a certain length if one is given."""
        if not isinstance(node, yaml.SequenceNode):
            self.refuse(node, f"{what} is not a list", "a list '[...]' is allowed", "write it as a list")
        if length is not None and len(node.value) != length:
            self.refuse(node, f"{what} has {len(node.value)} entries", f"{length} are allowed", "add or remove entries")
        return node.value

    def text(self, node: yaml.Node, what: str) -> str:
        """Read a text; YAML turns a bare yes, no, on or off into a truth value."""
        if not isinstance(node, yaml.ScalarNode) or node.tag != f"{_TAG}str":
            shown = f"'{node.value}'" if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            self.refuse(
                node, f"{what} is {shown}, which YAML does not read as text", "a text is allowed", "put it in quotes"
            )
        return node.value

    def number(self, node: yaml.Node, what: str) -> float:
        """Read a finite number."""
        if not isinstance(node, yaml.ScalarNode) or node.tag not in (f"{_TAG}float", f"{_TAG}int"):
            shown = f"'{node.value}'" if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            hint = "write it with a point, such as 1.0e-3"
            self.refuse(node, f"{what} is {shown}, which YAML does not read as a number", "a number is allowed", hint)
        value = float(yaml.SafeLoader("").construct_object(node))
        if not math.isfinite(value):
            self.refuse(node, f"{what} is {node.value}", "a finite number is allowed", "replace it")
        return value

    def interval(self, node: yaml.Node, what: str) -> tuple[float, float]:
        """Read two numbers."""
        lower, upper = self.sequence(node, what, 2)
        return self.number(lower, what), self.number(upper, what)

    def truth(self, node: yaml.Node, what: str) -> bool:
        """Read true or false."""
        if node.tag != f"{_TAG}bool":
            self.refuse(node, f"{what} is no truth value", "true or false is allowed", "write one of them")
        return bool(yaml.SafeLoader("").construct_object(node))

    def is_null(self, node: yaml.Node) -> bool:
        """Say whether a value was left empty."""
        return node.tag == f"{_TAG}null"

    def plain(self, node: yaml.Node, what: str) -> Any:
        """Read anything made of mappings, lists, texts, numbers, truth values and null; dates stay text."""
        if isinstance(node, yaml.MappingNode):
            entries = self.mapping(node, what, optional=None)
            return {key: self.plain(value, f"{what}.{key}") for key, value in entries.items()}
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, what) for item in node.value]
        if node.tag in {f"{_TAG}{kind}" for kind in ("int", "float", "bool", "null")}:
            return yaml.SafeLoader("").construct_object(node)
        return node.value
