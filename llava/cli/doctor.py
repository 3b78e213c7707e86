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

GIB = 2**30

MIN_FREE_DISK, MIN_SHARED_MEMORY, MIN_OPEN_FILES = 20 * GIB, GIB, 1024
"""A routed 7B checkpoint takes 15 GB; data loader workers pass batches through /dev/shm."""

MARKS = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "fail": ("FAIL", "bold red")}
"""State -> how it is printed."""


class Finding(NamedTuple):
    """One thing looked at, with what to do unless it is "ok"; "note": all else works, "fail": it must be mended."""

    name: str
    found: str
    state: Literal["ok", "note", "fail"] = "ok"
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
        raise typer.Exit(1)


def examine(folder: Path) -> Iterator[Finding]:
    """Look at Python, packages, GPUs and limits of a machine that would write to a folder, one after the other."""
    from llava.train.zero3 import find_dead_build

    yield Finding("python", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")
    yield from _packages()
    yield _torchvision()
    yield from _gpus()
    # DeepSpeed builds its CPU operators on first use; ninja is a Python package, its program may be off the PATH
    beside = str(Path(sys.executable).parent)
    missing = [name for name in ("g++", "ninja") if not (shutil.which(name) or shutil.which(name, path=beside))]
    remedy = "DeepSpeed needs them for CPU and offloaded runs; install them"
    text = f"{' and '.join(missing)} not found" if missing else f"g++ at {shutil.which('g++')}"
    yield _noted("compiler", text, missing, remedy)
    lock = find_dead_build()
    if lock is not None:
        yield Finding("operators", f"{lock}: a build of DeepSpeed's was killed", "fail", f"rm {lock}")
    yield from _limits(folder)
    # where hub checkpoints come from; no network is asked
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    cache = f"used for hub ids, cache in {os.environ.get('HF_HOME', '~/.cache/huggingface')}"
    text = "HF_HUB_OFFLINE is set" if is_offline else cache
    yield _noted("hub", text, is_offline, "name local checkpoint folders, or unset it")


def _noted(name: str, found: str, is_bad: object, remedy: str) -> Finding:
    """A finding that is noted, with its remedy, where it is bad."""
    return Finding(name, found, "note", remedy) if is_bad else Finding(name, found)


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
            remedy = f"pip install 'fuzzyroe[{extra}]'" if extra else install
            yield Finding(wanted.name, "not installed", "note" if extra else "fail", remedy)
            continue
        # a pre-release that is installed was chosen on purpose
        if wanted.specifier.contains(version, prereleases=True):
            yield Finding(wanted.name, version)
        else:
            yield Finding(wanted.name, f"{version}, wanted {wanted.specifier}", "fail", install)


def _torchvision() -> Finding:
    """A torchvision built for another torch breaks transformers when it is imported; none at all is fine."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "not installed, not needed")
    # found is not enough: it loads operators compiled against one torch
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        return Finding("torchvision", f"does not load: {reason}", "fail", "pip uninstall torchvision")
    return Finding("torchvision", torchvision.__version__)


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        is_cpu_build = (torch.version.cuda or torch.version.hip) is None
        remedy = "install a torch build for your CUDA" if is_cpu_build else "check the driver with nvidia-smi"
        yield Finding("GPU", f"none that torch {torch.__version__} can use", "note", f"for training at 7B, {remedy}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size, lacks_bf16 = properties.total_memory / GIB, not torch.cuda.is_bf16_supported(including_emulation=False)
        text = f"{properties.name}, {size:.0f} GiB{', no bfloat16' if lacks_bf16 else ''}"
        yield _noted(f"GPU {index}", text, lacks_bf16, "train with --fp16 True --bf16 False")
    # one process needs no communication
    if torch.cuda.device_count() > 1 and not torch.distributed.is_nccl_available():
        yield Finding("NCCL", "this torch has none", "fail", "install a torch build with NCCL")


def _limits(folder: Path) -> Iterator[Finding]:
    """Disk, shared memory and open files."""
    remedy = f"a 7B checkpoint takes 15 GB; make {MIN_FREE_DISK / GIB:.0f} GiB room"
    shared = "start the container with --shm-size=8g, or use --dataloader_num_workers 0"
    rooms = (("disk", folder, MIN_FREE_DISK, remedy), ("shared memory", Path("/dev/shm"), MIN_SHARED_MEMORY, shared))
    for name, place, wanted, remedy in rooms:
        if place.is_dir():
            free = shutil.disk_usage(place).free
            yield _noted(name, f"{free / GIB:.1f} GiB free in {place}", free < wanted, remedy)
    if os.name == "posix":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        is_low = limit != resource.RLIM_INFINITY and limit < MIN_OPEN_FILES
        text = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
        yield _noted("open files", text, is_low, f"ulimit -n {MIN_OPEN_FILES} or more, for many workers")
