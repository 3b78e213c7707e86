"""Compare the running Python's packages with what pyproject.toml asks for.

    python scripts/check_environment.py [EXTRA ...]          report; exit 1 if something needed is missing or broken
    python scripts/check_environment.py --broken-companions  name the installed torch companions that cannot be imported

It imports nothing but the standard library and ``packaging``, so that it can report on an empty environment.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPANIONS = ("torchvision", "torchaudio")  # compiled against one build of torch; transformers imports them if present
OPTIONAL = ("pre-commit",)  # for committing, not for running or testing


def read_requirements(extras: list[str]) -> list[str]:
    """The requirement strings of the core and of ``extras``, as pyproject.toml has them."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    for extra in extras:
        if extra not in known:
            raise KeyError(f"Unknown extra '{extra}'; pyproject.toml has {', '.join(sorted(known))}.")
    return [*project["dependencies"], *(line for extra in extras for line in known[extra])]


def compare(requirement_lines: list[str]) -> tuple[list[str], list[str]]:
    """Sort the requirements that are not met.

    Args:
        requirement_lines: Requirements as in pyproject.toml.

    Returns:
        Requirements with no installed version, and one sentence for each installed version outside its range.
    """
    from packaging.requirements import Requirement

    missing, outside = [], []
    for requirement in map(Requirement, requirement_lines):
        if requirement.name in OPTIONAL:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            outside.append(f"{requirement.name} {version} is installed, {requirement.specifier} is supported")
    return missing, outside


def imports(name: str) -> bool:
    """Whether ``import name`` works, tried in a process of its own."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def broken_companions() -> list[str]:
    """Installed companions of an installed torch that raise on import."""
    if find_spec("torch") is None:
        return []
    return [name for name in COMPANIONS if find_spec(name) is not None and not imports(name)]


def report(extras: list[str]) -> int:
    """Print what keeps FuzzyRoE from running here; the exit status."""
    python = sys.executable
    requirement_lines = read_requirements(extras)
    missing, outside = (requirement_lines, []) if find_spec("packaging") is None else compare(requirement_lines)
    broken = broken_companions()
    for sentence in outside:
        say(f"warning: {sentence}; going on, expect trouble there.")
    if missing:
        needed = " ".join(f"'{line}'" for line in missing)
        say(f"error: {python} lacks {', '.join(missing)}.")
        say(f"  Install them there: {python} -m pip install {needed}")
        say("  or unset FUZZYROE_PYTHON to let this repository make its own .venv.")
    for name in broken:
        say(f"error: {name} cannot be imported beside torch {metadata.version('torch')}; transformers fails on that.")
        say("  The two are builds for different devices or versions; FuzzyRoE needs torch alone.")
        say(f"  Remove it ({python} -m pip uninstall {name}) or install the build that belongs to this torch.")
    if not any(metadata.distributions(name="fuzzyroe")):
        say("note: fuzzyroe is not installed there, so the command `fuzzyroe` and lmms-eval's `--model fuzzyroe` are")
        say(f"  not found. From the repository root: {python} -m pip install --no-deps -e .")
    return 1 if missing or broken else 0


def say(sentence: str) -> None:
    """Print one line of the report."""
    print(f"[env] {sentence}", file=sys.stderr)


def main() -> int:
    """Parse the command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="extras of pyproject.toml that are needed too")
    parser.add_argument("--broken-companions", action="store_true", help="print the companions that cannot be imported")
    arguments = parser.parse_args()
    if arguments.broken_companions:
        print("\n".join(broken_companions()))
        return 0
    return report(arguments.extras)


if __name__ == "__main__":
    sys.exit(main())
