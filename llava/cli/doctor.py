"""``fuzzyroe doctor``: what of this machine and its packages stands in the way, found without loading a model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
from packaging.requirements import Requirement

BROKEN = 1
"""Exit code where something must be mended first."""

GIB = 2**30

MIN_FREE_DISK = 20 * GIB
"""A routed 7B checkpoint takes 15 GB."""

MIN_SHARED_MEMORY = GIB
"""Data loader workers pass batches through /dev/shm."""

MIN_OPEN_FILES = 1024

MARKS = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "fail": ("FAIL", "bold red")}
"""State -> how it is printed."""


class Finding(NamedTuple):
    """One thing looked at.

    Attributes:
        name: What was looked at.
        state: "ok", "note" (something cannot be used, all else works) or "fail".
        found: What was found.
        remedy: What to do; empty where it is ok.
    """

    name: str
    state: Literal["ok", "note", "fail"]
    found: str
    remedy: str = ""


def doctor_command(
    folder: Annotated[Path, typer.Option(help="Folder that outputs would be written to.", exists=True)] = Path("."),
) -> None:
    """Look at Python, packages, GPUs and limits; exit code 1 if something must be mended."""
    from rich.text import Text

    from llava.cli.terminal import open_console

    console, failed = open_console(), 0
    for finding in examine(folder):
        failed += finding.state == "fail"
        line = Text.assemble(MARKS[finding.state], f"  {finding.name:<14} {finding.found}")
        if finding.remedy:
            line.append(f"\n{'':21}{finding.remedy}", style="dim")
        console.print(line)
    if failed:
        console.print(f"{failed} to mend", style="bold")
        raise typer.Exit(BROKEN)


def examine(folder: Path) -> Iterator[Finding]:
    """Look at Python, packages, GPUs and limits, one finding after the other.

    Args:
        folder: Where outputs would be written.
    """
    yield Finding("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")
    yield from _packages()
    yield _torchvision()
    yield from _gpus()
    yield _compiler()
    remedy = f"a 7B checkpoint takes 15 GB; make {MIN_FREE_DISK / GIB:.0f} GiB room"
    yield _room("disk", folder, MIN_FREE_DISK, remedy)
    if Path("/dev/shm").is_dir():
        remedy = "start the container with --shm-size=8g, or use --dataloader_num_workers 0"
        yield _room("shared memory", Path("/dev/shm"), MIN_SHARED_MEMORY, remedy)
    yield from _open_files()
    yield _hub()


def _packages() -> Iterator[Finding]:
    """What ``pyproject.toml`` asks for; what only an extra asks for may be missing."""
    extras = importlib.metadata.metadata("fuzzyroe").get_all("Provides-Extra") or []
    for wanted in map(Requirement, importlib.metadata.requires("fuzzyroe") or []):
        marker = wanted.marker
        # a marker holds for the package itself, for one of its extras, or for another Python or system
        extra = next((name for name in ("", *extras) if marker is None or marker.evaluate({"extra": name})), "dev")
        if extra == "dev":
            continue
        install = f"pip install '{wanted.name}{wanted.specifier}'"
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if extra:
                yield Finding(wanted.name, "note", "not installed", f"pip install 'fuzzyroe[{extra}]'")
            else:
                yield Finding(wanted.name, "fail", "not installed", install)
            continue
        # a pre-release that is installed was chosen on purpose
        if wanted.specifier.contains(version, prereleases=True):
            yield Finding(wanted.name, "ok", version)
        else:
            yield Finding(wanted.name, "fail", f"{version}, wanted {wanted.specifier}", install)


def _torchvision() -> Finding:
    """A torchvision built for another torch breaks transformers when it is imported; none at all is fine."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed, not needed")
    # found is not enough: it loads operators compiled against one torch
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        return Finding("torchvision", "fail", f"does not load: {reason}", "pip uninstall torchvision")
    return Finding("torchvision", "ok", torchvision.__version__)


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        is_cpu_build = (torch.version.cuda or torch.version.hip) is None
        remedy = "install a torch build for your CUDA" if is_cpu_build else "check the driver with nvidia-smi"
        yield Finding("GPU", "note", f"none that torch {torch.__version__} can use", f"for training at 7B, {remedy}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding(f"GPU {index}", "ok", size)
        else:
            yield Finding(f"GPU {index}", "note", f"{size}, no bfloat16", "train with --fp16 True --bf16 False")
    # one process needs no communication
    if torch.cuda.device_count() > 1 and not torch.distributed.is_nccl_available():
        yield Finding("NCCL", "fail", "this torch has none", "install a torch build with NCCL")


def _compiler() -> Finding:
    """DeepSpeed builds its CPU operators on first use."""
    beside = str(Path(sys.executable).parent)  # ninja is a Python package, its program may be off the PATH
    missing = [name for name in ("g++", "ninja") if not (shutil.which(name) or shutil.which(name, path=beside))]
    if missing:
        text = f"{' and '.join(missing)} not found"
        return Finding("compiler", "note", text, "DeepSpeed needs them for CPU and offloaded runs; install them")
    return Finding("compiler", "ok", f"g++ at {shutil.which('g++')}")


def _room(name: str, folder: Path, wanted: int, remedy: str) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free in {folder}"
    return Finding(name, "ok", text) if free >= wanted else Finding(name, "note", text, remedy)


def _open_files() -> Iterator[Finding]:
    if os.name != "posix":
        return
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        yield Finding("open files", "ok", "unlimited")
    elif limit >= MIN_OPEN_FILES:
        yield Finding("open files", "ok", f"{limit:,}")
    else:
        remedy = f"ulimit -n {MIN_OPEN_FILES} or more, before training with many workers"
        yield Finding("open files", "note", f"{limit:,}", remedy)


def _hub() -> Finding:
    """Says where hub checkpoints come from; asks no network."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "note", "HF_HUB_OFFLINE is set", "name local checkpoint folders, or unset it")
    return Finding("hub", "ok", f"used for hub ids, cache in {os.environ.get('HF_HOME', '~/.cache/huggingface')}")
