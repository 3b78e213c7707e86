"""What the machine and its packages can run, found without loading a model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

GIB = 2**30

MIN_FREE_DISK = 20 * GIB
"""A routed 7B checkpoint takes 15 GB."""

MIN_SHARED_MEMORY = GIB
"""Data loader workers pass batches through /dev/shm."""

MIN_OPEN_FILES = 1024


@dataclass(frozen=True)
class Finding:
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


def examine(folder: Path) -> Iterator[Finding]:
    """Look at Python, packages, GPUs and limits, one finding after the other.

    Args:
        folder: Where outputs would be written.
    """
    yield _python()
    yield from _packages()
    yield _torchvision()
    yield from _gpus()
    yield _compiler()
    yield _disk(folder)
    yield from _limits()
    yield _hub()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", "ok", f"{version} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    """What ``pyproject.toml`` asks for; what only an extra asks for may be missing."""
    for line in importlib.metadata.requires("fuzzyroe") or []:
        wanted = Requirement(line)
        extra = _extra_of(wanted)
        if extra == "dev" or (wanted.marker and not extra and not wanted.marker.evaluate()):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            remedy = f"pip install 'fuzzyroe[{extra}]'" if extra else f"pip install '{wanted.name}{wanted.specifier}'"
            yield Finding(wanted.name, "note" if extra else "fail", "not installed", remedy)
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            remedy = f"pip install '{wanted.name}{wanted.specifier}'"
            yield Finding(wanted.name, "fail", f"{version}, wanted {wanted.specifier}", remedy)
        else:
            yield Finding(wanted.name, "ok", version)


def _extra_of(wanted: Requirement) -> str:
    """The extra that a requirement belongs to; empty for a requirement of the package itself."""
    if wanted.marker is None:
        return ""
    extras = importlib.metadata.metadata("fuzzyroe").get_all("Provides-Extra") or []
    with_extra = [extra for extra in extras if wanted.marker.evaluate({"extra": extra})]
    return "" if wanted.marker.evaluate({"extra": ""}) or not with_extra else with_extra[0]


def _torchvision() -> Finding:
    """A torchvision built for another torch breaks transformers when it is imported; none at all is fine."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed, not needed")
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        return Finding("torchvision", "fail", f"does not load: {reason}", "pip uninstall torchvision")
    return Finding("torchvision", "ok", torchvision.__version__)


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        remedy = "install a torch build for your CUDA" if built is None else "check the driver with nvidia-smi"
        yield Finding("GPU", "note", f"none that torch {torch.__version__} can use", f"for training at 7B, {remedy}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding(f"GPU {index}", "ok", found)
        else:
            yield Finding(f"GPU {index}", "note", f"{found}, no bfloat16", "train with --fp16 True --bf16 False")
    if torch.cuda.device_count() > 1 and not torch.distributed.is_nccl_available():
        yield Finding("NCCL", "fail", "this torch has none", "install a torch build with NCCL")


def _compiler() -> Finding:
    """DeepSpeed builds its CPU operators on first use."""
    missing = [program for program in ("g++", "ninja") if _find_program(program) is None]
    if missing:
        found = f"{' and '.join(missing)} not found"
        return Finding("compiler", "note", found, "DeepSpeed needs them for CPU and offloaded runs; install them")
    return Finding("compiler", "ok", f"g++ at {shutil.which('g++')}")


def _find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.0f} GiB free in {folder}"
    if free < MIN_FREE_DISK:
        return Finding("disk", "note", found, f"a 7B checkpoint takes 15 GB; make {MIN_FREE_DISK / GIB:.0f} GiB room")
    return Finding("disk", "ok", found)


def _limits() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free
        found = f"{size / GIB:.1f} GiB free in /dev/shm"
        remedy = "start the container with --shm-size=8g, or use --dataloader_num_workers 0"
        yield Finding("shared memory", *(("ok", found) if size >= MIN_SHARED_MEMORY else ("note", found, remedy)))
    if os.name == "posix":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        is_enough = limit == resource.RLIM_INFINITY or limit >= MIN_OPEN_FILES
        found = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
        remedy = f"ulimit -n {MIN_OPEN_FILES} or more, before training with many workers"
        yield Finding("open files", *(("ok", found) if is_enough else ("note", found, remedy)))


def _hub() -> Finding:
    """Says where hub checkpoints come from; asks no network."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline:
        return Finding("hub", "note", "HF_HUB_OFFLINE is set", "name local checkpoint folders, or unset it")
    return Finding("hub", "ok", f"used for hub ids, cache in {os.environ.get('HF_HOME', '~/.cache/huggingface')}")
