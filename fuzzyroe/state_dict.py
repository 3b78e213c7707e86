"""The tensors that routing adds to a model, under names that do not depend on what wraps its decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fuzzyroe.attach import find_decoder, find_decoder_layers, find_router, is_attached
from fuzzyroe.files import atomic_write


def routing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Give the live routing tensors: parameters of adapters, parameters and persistent buffers of the router.

    Returns:
        ``layers.{index}.adapter.*`` and ``router.*`` -> the tensor itself, sharing memory (and, for parameters,
        being the parameter), so that gathering and optimizer groups can be built from it.

    Raises:
        ValueError: If the model is not attached.
    """
    if not is_attached(model):
        raise ValueError(f"{type(model).__name__} has no routed layers, hence no routing tensors. Call attach first.")
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(find_decoder_layers(model)):
        tensors |= layer.adapter.state_dict(prefix=f"layers.{index}.adapter.", keep_vars=True)
    router = find_router(model)
    if router is not None:
        tensors |= router.state_dict(prefix="router.", keep_vars=True)
    return tensors


def routing_names(model: nn.Module) -> dict[str, str]:
    """Map the name of each routing tensor in ``model.state_dict()`` to its name in a routing file.

    Raises:
        ValueError: If the decoder is not a submodule of ``model``.
    """
    # wrappers (LLaVA, LoRA, engines) put the decoder at paths of their own, which a file must not depend on
    decoder = find_decoder(model)
    prefixes = [name for name, module in model.named_modules() if module is decoder]
    if not prefixes:
        raise ValueError(
            f"The decoder of {type(model).__name__} is none of its submodules; names need the path to it. "
            "Pass the module that holds the decoder."
        )
    prefix = f"{prefixes[0]}." if prefixes[0] else ""
    return {prefix + name: name for name in routing_tensors(model)}


def routing_state_dict(model: nn.Module, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Give contiguous copies of the routing tensors on the CPU, ready to be saved.

    Args:
        model: An attached model.
        gathered: Full tensors under the names of ``model.state_dict()``, e.g. gathered from shards; more names may be
            in it. None reads the model itself.

    Raises:
        KeyError: If ``gathered`` lacks a routing tensor.
    """
    if gathered is None:
        return {name: _cpu_copy(tensor) for name, tensor in routing_tensors(model).items()}
    names = routing_names(model)
    missing = sorted(set(names) - set(gathered))
    if missing:
        raise KeyError(f"The gathered state lacks the routing tensors {missing}; gather adapters and router as well.")
    return {name: _cpu_copy(gathered[full_name]) for full_name, name in names.items()}


def load_routing_state_dict(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy routing tensors into an attached model; all of them or, on any disagreement, none.

    Dtype and device of the model's tensors stay.

    Raises:
        ValueError: If names or shapes disagree; lists every missing, unexpected and misshapen tensor.
    """
    targets = routing_tensors(model)
    missing, unexpected = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    misshapen = [
        f"{name} {tuple(tensors[name].shape)}, not {tuple(target.shape)}"
        for name, target in targets.items()
        if name in tensors and tensors[name].shape != target.shape
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"The routing tensors do not fit the model: missing {missing}, unexpected {unexpected}, wrong shape "
            f"{misshapen}. Names and shapes must agree exactly; attach with the adapter width and router they were "
            "saved with."
        )
    # copied, not assigned: parameters may stand in an optimizer already
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def save_routing(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write what ``routing_state_dict`` gave to a safetensors file, which appears whole or not at all."""
    with atomic_write(path) as unfinished:
        save_file(dict(tensors), unfinished, metadata={"format": "pt"})


def load_routing(path: str | Path) -> dict[str, Tensor]:
    """Read the routing tensors of a file that ``save_routing`` wrote, onto the CPU."""
    return load_file(path)


def _cpu_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
