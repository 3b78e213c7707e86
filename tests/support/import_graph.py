"""Who imports whom, read from syntax trees.

Nothing is imported or run, so a rule can be checked on code whose requirements are not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        importer: Dotted name of the importing module.
        target: Dotted name of what is imported; for ``from a import b`` that is ``a.b``.
        function: Qualified name of the enclosing function, or None at module level.
        type_checking: Whether it stands under ``if TYPE_CHECKING``, so that it never runs.
        line: Line number.
    """

    importer: str
    target: str
    function: str | None
    type_checking: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"

    def reaches(self, module: str) -> bool:
        """Whether this imports ``module`` or something inside it."""
        return is_inside(self.target, module)


def is_inside(name: str, package: str) -> bool:
    """Whether the dotted ``name`` is ``package`` or lies below it."""
    return name == package or name.startswith(package + ".")


def find_modules(root: Path, packages: tuple[str, ...]) -> dict[str, Path]:
    """Dotted name to file, for every module of ``packages`` below ``root``."""
    modules = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_imports(module: str, tree: ast.Module, is_package: bool = False) -> list[Import]:
    """Every import in ``tree``, relative ones resolved, lazy and type-checking ones included."""
    return list(_walk(module, tree, is_package, function=None, type_checking=False))


def _walk(module: str, node: ast.AST, is_package: bool, function: str | None, type_checking: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, alias.name, function, type_checking, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            source = _resolve(module, child, is_package)
            for alias in child.names:
                yield Import(module, f"{source}.{alias.name}", function, type_checking, child.lineno)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = child.name if function is None else f"{function}.{child.name}"
            yield from _walk(module, child, is_package, name, type_checking)
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            for statement in child.body:
                wrapper = ast.Module(body=[statement], type_ignores=[])
                yield from _walk(module, wrapper, is_package, function, type_checking=True)
            for statement in child.orelse:
                wrapper = ast.Module(body=[statement], type_ignores=[])
                yield from _walk(module, wrapper, is_package, function, type_checking)
        else:
            yield from _walk(module, child, is_package, function, type_checking)


def _resolve(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, node.module] if node.module else base)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def build_graph(imports: list[Import], modules: set[str]) -> dict[str, set[str]]:
    """Module to the modules of this repository that it runs code of; type-checking imports do not count."""
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for item in imports:
        target = _owner(item.target, modules)
        if target is not None and target != item.importer and not item.type_checking:
            graph[item.importer].add(target)
    return graph


def _owner(target: str, modules: set[str]) -> str | None:
    """The module that a target names, or that defines the name it ends in."""
    if target in modules:
        return target
    parent = target.rpartition(".")[0]
    return parent if parent in modules else None


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, first repeated at the end; None if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(graph.get(module, ())):
            cycle = visit(target, [*path, module])
            if cycle:
                return cycle
        done.add(module)
        return None

    for module in sorted(graph):
        cycle = visit(module, [])
        if cycle:
            return cycle
    return None
