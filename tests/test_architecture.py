"""The import rules, sizes and docstrings that keep the two packages readable, checked on the syntax trees."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from dataclasses import replace
from pathlib import Path

import pytest

from import_graph import Import, build_graph, find_cycle, find_modules, is_inside, read_imports

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fuzzyroe", "llava")
MAX_LINES = 600
MAX_IMPORTS = 15

MODULES = find_modules(ROOT, PACKAGES)
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}
IMPORTS = [
    item for module, tree in TREES.items() for item in read_imports(module, tree, MODULES[module].name == "__init__.py")
]

# What the method may import besides the standard library and itself.
METHOD_ANYWHERE = {"numpy", "torch", "ruamel", "safetensors"}
METHOD_LAZILY = {"scipy"}

# A part of llava imports parts of its own or a lower level. train is above all but the command line.
LEVELS = {
    "constants": 0,
    "files": 0,
    "conversation": 1,
    "mm_utils": 1,
    "data": 2,
    "model": 2,
    "inference": 3,
    "report": 3,
    "serve": 4,
    "eval": 4,
    "train": 4,
    "cli": 5,
}


def level(module: str) -> int | None:
    """Level of a module of llava; None for the package itself and for other packages."""
    parts = module.split(".")
    return LEVELS[parts[1]] if parts[0] == "llava" and len(parts) > 1 and parts[1] in LEVELS else None


def listed(items: list) -> str:
    """One item per line, for a failure message."""
    return "\n" + "\n".join(map(str, items))


def allowed_in_the_method(item: Import) -> bool:
    """Whether the method may have this import."""
    name = item.target.split(".")[0]
    if name in METHOD_ANYWHERE or name == "fuzzyroe" or name in sys.stdlib_module_names:
        return True
    if name == "matplotlib" and item.importer == "fuzzyroe.plots":
        return True
    if name in METHOD_LAZILY:
        return item.function is not None or item.type_checking
    if name in ("skfuzzy", "networkx"):  # networkx holds scikit-fuzzy's rules and is imported by it
        return item.importer == "fuzzyroe.rules.skfuzzy_bridge"
    if name == "transformers":
        return item.type_checking or (item.importer == "fuzzyroe.cache" and item.reaches("transformers.cache_utils"))
    return False


def test_the_method_imports_only_what_it_may() -> None:
    wrong = [item for item in IMPORTS if is_inside(item.importer, "fuzzyroe") and not allowed_in_the_method(item)]
    assert not wrong, listed(wrong)


def test_data_does_not_import_model() -> None:
    wrong = [item for item in IMPORTS if is_inside(item.importer, "llava.data") and item.reaches("llava.model")]
    assert not wrong, listed(wrong)


def test_nothing_imports_train_but_train_itself_and_the_command_line_when_it_runs() -> None:
    wrong = [
        item
        for item in IMPORTS
        if item.reaches("llava.train")
        and not is_inside(item.importer, "llava.train")
        and not (is_inside(item.importer, "llava.cli") and (item.function or item.type_checking))
    ]
    assert not wrong, listed(wrong)


def test_every_part_of_llava_has_a_level() -> None:
    parts = {module.split(".")[1] for module in MODULES if module.startswith("llava.")}
    assert parts <= set(LEVELS), f"give {sorted(parts - set(LEVELS))} a level in LEVELS, after reading the import rules"


def test_llava_imports_go_down_the_levels() -> None:
    wrong = []
    for item in IMPORTS:
        above, below = level(item.importer), level(item.target)
        if above is not None and below is not None and below > above:
            wrong.append(item)
    assert not wrong, listed(wrong)


def test_scikit_fuzzy_is_imported_in_one_file() -> None:
    importers = {item.importer for item in IMPORTS if item.reaches("skfuzzy")}
    assert importers <= {"fuzzyroe.rules.skfuzzy_bridge"}


def test_deepspeed_is_imported_in_one_function() -> None:
    places = {(item.importer, item.function) for item in IMPORTS if item.reaches("deepspeed")}
    assert all(function is not None for _, function in places), listed(sorted(places, key=str))
    assert len(places) <= 1, listed(sorted(places))


@pytest.mark.parametrize("library", ["typer", "rich"])
def test_command_line_libraries_stay_in_the_command_line(library: str) -> None:
    wrong = [item for item in IMPORTS if item.reaches(library) and not is_inside(item.importer, "llava.cli")]
    assert not wrong, listed(wrong)


def names_a_base(module: str, tree: ast.Module) -> list[str]:
    """Places where a module names what is a base model's: its record, its classes of transformers, its image token.

    A family of base models is one record in ``llava.model.families``; others ask that package.
    """
    wrong = []
    for item in read_imports(module, tree):
        is_class = item.reaches("transformers") and item.target.rpartition(".")[2].startswith(("Llava", "CLIP"))
        if is_class or item.reaches("llava.model.families.llava15"):
            wrong.append(str(item))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        is_config = owner.endswith(("config", "cfg"))
        if node.attr in ("image_token_index", "image_seq_length") or (node.attr == "image_token_id" and is_config):
            wrong.append(f"{module}:{node.lineno}: .{node.attr}")
    return wrong


def test_only_families_name_a_base_model() -> None:
    outside = {module: tree for module, tree in TREES.items() if not is_inside(module, "llava.model.families")}
    wrong = [place for module, tree in outside.items() for place in names_a_base(module, tree)]
    assert not wrong, f"ask llava.model.families instead:{listed(wrong)}"


def test_packages_do_not_import_what_is_not_installed_with_them() -> None:
    wrong = [
        item for item in IMPORTS for name in ("tests", "scripts", "playground", "random_drop") if item.reaches(name)
    ]
    assert not wrong, listed(wrong)


def test_no_module_imports_itself_through_others_not_even_for_types() -> None:
    imports = [replace(item, type_checking=False) for item in IMPORTS]
    cycle = find_cycle(build_graph(imports, set(MODULES)))
    assert cycle is None, " -> ".join(cycle or [])


def test_no_star_imports() -> None:
    wrong = [item for item in IMPORTS if item.target.endswith(".*")]
    assert not wrong, listed(wrong)


def test_no_module_variable_is_reassigned_from_a_function() -> None:
    wrong = [
        f"{module}:{node.lineno}: global {', '.join(node.names)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert not wrong, listed(wrong)


def test_no_file_is_too_long() -> None:
    paths = [ROOT / "random_drop.py"]
    for folder in (*PACKAGES, "scripts", "tests", "playground"):
        paths += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths if path.is_file()}
    too_long = [f"{path.relative_to(ROOT)}: {count} lines" for path, count in lengths.items() if count > MAX_LINES]
    assert not too_long, f"split by concept:{listed(too_long)}"


def test_no_module_imports_too_many_others() -> None:
    graph = build_graph([replace(item, type_checking=False) for item in IMPORTS], set(MODULES))
    too_many = {
        module: len(set(targets) - {module}) for module, targets in graph.items() if len(set(targets)) > MAX_IMPORTS
    }
    assert not too_many, f"at most {MAX_IMPORTS} modules of the project: {too_many}"


def test_training_stays_within_sixteen_files() -> None:
    files = sorted(path.name for path in (ROOT / "llava" / "train").glob("*.py"))
    assert len(files) <= 16, f"llava/train has {len(files)} files, 16 are allowed: {files}"


def count_comments(source: str) -> tuple[int, int]:
    """Comments of a module and its lines of code, docstrings not counted."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    comments, code = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += not token.string.startswith(("# type:", "# noqa", "# fmt", "# ruff"))
        elif token.string.strip():
            code |= set(range(token.start[0], token.end[0] + 1))
    return comments, len(code - docstrings)


@pytest.mark.parametrize("package", PACKAGES)
def test_comments_stand_at_the_turning_points(package: str) -> None:
    counts = [count_comments(path.read_text(encoding="utf-8")) for path in (ROOT / package).rglob("*.py")]
    comments, code = (sum(column) for column in zip(*counts, strict=True))
    assert 100 * comments / code >= 4, f"{comments} comments in {code} lines of {package}; at least 4 per 100 say why"


def find_undocumented(module: str, tree: ast.Module) -> list[str]:
    """Public names of a module, the module included, that have no docstring."""
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    missing = [] if ast.get_docstring(tree) else [module]
    for node in tree.body:
        if isinstance(node, documented) and not node.name.startswith("_") and not ast.get_docstring(node):
            missing.append(f"{module}.{node.name}:{node.lineno}")
    return missing


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module: str) -> None:
    missing = find_undocumented(module, TREES[module])
    assert not missing, listed(missing)


@pytest.mark.parametrize("module", MODULES)
def test_annotations_are_not_evaluated(module: str) -> None:
    defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in TREES[module].body)
    imports = {item.target for item in IMPORTS if item.importer == module}
    assert not defines or "__future__.annotations" in imports, "begin with `from __future__ import annotations`"


def test_import_llava_has_no_side_effects() -> None:
    program = (
        "import sys, os, logging\n"
        "before, environment = set(sys.modules), dict(os.environ)\n"
        "import llava\n"
        "assert dict(os.environ) == environment, 'environment changed'\n"
        "assert not logging.getLogger().handlers, 'logging configured'\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    loaded = {name for name in result.stdout.split() if name not in sys.stdlib_module_names}
    assert loaded == {"llava"}


# The checks above pass on good code; these show that they fail on bad code.


def parse(module: str, source: str, is_package: bool = False) -> list[Import]:
    """Imports of a literal source text."""
    return read_imports(module, ast.parse(source), is_package)


@pytest.mark.parametrize(
    ("module", "source", "is_allowed"),
    [
        ("fuzzyroe.routers.roe.training", "import torch.nn as nn", True),
        ("fuzzyroe.routers.roe.training", "import llava", False),
        ("fuzzyroe.routers.roe.training", "def f():\n    from llava.model import builder", False),
        ("fuzzyroe.routers.roe.training", "from transformers import Cache", False),
        (
            "fuzzyroe.routers.roe.training",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
            True,
        ),
        ("fuzzyroe.cache", "from transformers.cache_utils import DynamicLayer", True),
        ("fuzzyroe.cache", "from transformers import DynamicCache", False),
        ("fuzzyroe.rules.skfuzzy_bridge", "import skfuzzy", True),
        ("fuzzyroe.features", "import skfuzzy", False),
        ("fuzzyroe.rules.fitting", "import scipy.optimize", False),
        ("fuzzyroe.rules.fitting", "def f():\n    import scipy.optimize", True),
        ("fuzzyroe.features", "from .rules import rule_base", True),
    ],
)
def test_the_rule_for_the_method_tells_good_from_bad(module: str, source: str, is_allowed: bool) -> None:
    assert all(map(allowed_in_the_method, parse(module, source))) is is_allowed


@pytest.mark.parametrize(
    ("module", "source", "is_package", "target"),
    [
        ("a.b.c", "from . import d", False, "a.b.d"),
        ("a.b.c", "from ..x import d", False, "a.x.d"),
        ("a.b", "from .x import d", True, "a.b.x.d"),
        ("a.b.c", "try:\n    import x.y\nexcept ImportError:\n    pass", False, "x.y"),
        ("a.b.c", "class K:\n    def f(self):\n        import x", False, "x"),
    ],
)
def test_imports_are_resolved_wherever_they_stand(module: str, source: str, is_package: bool, target: str) -> None:
    assert [item.target for item in parse(module, source, is_package)] == [target]


def test_a_cycle_is_found_through_lazy_imports_and_not_through_types() -> None:
    lazy = parse("p.a", "from p import b") + parse("p.b", "def f():\n    from p.a import g")
    typed = parse("p.a", "from p import b") + parse("p.b", "import typing\nif typing.TYPE_CHECKING:\n    import p.a")
    assert find_cycle(build_graph(lazy, {"p.a", "p.b"})) == ["p.a", "p.b", "p.a"]
    assert find_cycle(build_graph(typed, {"p.a", "p.b"})) is None


@pytest.mark.parametrize(
    ("source", "is_allowed"),
    [
        ("from transformers import LlavaConfig", False),
        ("from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil", False),
        ("from llava.model.families.llava15 import LLAVA15", False),
        ("n = model.config.image_token_index", False),
        ("n = config.image_token_id", False),
        ("n = meter.image_token_id", True),
        ("from llava.model.families import HostModel", True),
        ("from transformers import Trainer", True),
    ],
)
def test_the_rule_for_base_models_tells_good_from_bad(source: str, is_allowed: bool) -> None:
    assert (not names_a_base("llava.eval.m", ast.parse(source))) is is_allowed


def test_a_missing_docstring_is_found() -> None:
    source = '"""A module."""\ndef good():\n    """Good."""\ndef bad(): ...\ndef _private(): ...\n'
    assert find_undocumented("m", ast.parse(source)) == ["m.bad:4"]
