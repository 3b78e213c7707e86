"""Links, file names and Python examples of README and docs, held against the repository."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.exists()
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# paths of this repository as prose and commands write them; what has a wildcard or a capital variable is no path
PATH = re.compile(r"(?<![\w/.-])((?:fuzzyroe|llava|scripts|tests|playground|docs)/[\w./-]+\.(?:py|sh|yaml|json|md))\b")
MADE_BY_COMMANDS = ("playground/data/",)


def name_of(page: Path) -> str:
    """A page as a test's id."""
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[str]:
    """The Python examples of a page."""
    return [code for language, code in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "python"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    broken = [target for target in targets if target and not (page.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_anchor_is_a_heading_of_its_page(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if "://" in link or not anchor:
            continue
        text = ((page.parent / target) if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if anchor not in slugs:
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = set(PATH.findall(page.read_text(encoding="utf-8")))
    missing = [path for path in sorted(named) if not path.startswith(MADE_BY_COMMANDS) and not (ROOT / path).exists()]
    missing = [path for path in missing if not re.search(r"/[A-Z]+\.", path)]  # NAME.py stands for any
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_python_examples_import_what_exists(page: Path) -> None:
    for code in python_blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("fuzzyroe", "llava"):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], code


def test_the_reading_list_of_the_readme_has_true_line_counts() -> None:
    rows = re.findall(r"^\| \[`([^`]+)`\]\([^)]+\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 8
    for path, told in rows:
        counted = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert abs(int(told) - counted) <= 0.1 * counted, f"{path} has {counted} lines, README says {told}"
