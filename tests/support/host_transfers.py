"""Counting what waits for a device: tensors read, converted or copied to the host from the code under test."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {
    Tensor.tolist,
    Tensor.item,
    Tensor.cpu,
    Tensor.numpy,
    Tensor.nonzero,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__array__,
    torch.equal,
    torch.nonzero,
    Tensor.equal,
}


class HostTransfers(TorchFunctionMode):
    """Counts calls that read a tensor on the host, by the place they come from.

    On a CPU nothing is copied, but the same calls are made; each would make the host wait for a GPU.

    Args:
        packages: Packages whose code is counted.
        known_on_host: ``module:function`` places that read tensors which live on the host by their definition.

    Attributes:
        places: ``module:function:call`` -> how often.
    """

    def __init__(self, packages: tuple[str, ...], known_on_host: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.packages, self.known_on_host = packages, known_on_host
        self.places: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count the call and make it."""
        if func in READS or _reads(func, args):
            frame = sys._getframe(1)
            module = frame.f_globals.get("__name__", "")
            place = f"{module}:{frame.f_code.co_name}"
            if module.split(".")[0] in self.packages and place not in self.known_on_host:
                self.places[f"{place}:{func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


def _reads(func: Any, args: tuple) -> bool:
    """Whether this call of a function that seldom reads does read: a copy to the CPU, or selection by a mask."""
    if func is Tensor.to:
        return any(isinstance(argument, str) and argument == "cpu" for argument in args)
    if func is Tensor.__getitem__:
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places)
    return False
