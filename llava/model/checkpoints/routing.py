"""Adapters and router of a checkpoint, ours or of RoE's own code, read but not yet attached to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import cached_file

from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.routers import get_router_class
from fuzzyroe.routers.base import Router
from fuzzyroe.routers.roe.training import PUBLISHED
from fuzzyroe.state_dict import load_routing, save_routing
from llava.model.checkpoints.weights import list_names
from llava.model.families import KeyMap

ROUTING_FILE = "routing.safetensors"

ROE_NAMES = KeyMap(
    (
        (r"model\.layers\.(\d+)\.adapter_MHA\.conv_A\.weight\Z", r"layers.\1.adapter.down.weight"),
        (r"model\.layers\.(\d+)\.adapter_MHA\.conv_B\.weight\Z", r"layers.\1.adapter.up.weight"),
        (r"model\.layers\.(\d+)\.adapter_MHA_router\.expert\.0\.weight\Z", r"router.layers.\1.weight"),
        (r"model\.adapter_image_token\.weight\Z", "router.source.tokens.image"),
        (r"model\.adapter_text_token\.weight\Z", "router.source.tokens.text"),
        # what only looks like RoE's keeps its name, so that it is refused
        (r"(model\.(?:layers\.\d+\.adapter_MHA|adapter_image_token|adapter_text_token))", r"\1"),
    )
)
"""RoE's names -> ours, those of ``fuzzyroe.state_dict``; no other weight of a LLaVA has a name here."""

COMPAT = replace(PUBLISHED, batch_decides_together=False)
"""The published behaviour that the weights were trained for; a row is nevertheless answered as it is alone."""


@dataclass(frozen=True)
class StoredRouting:
    """Adapters and router.

    Attributes:
        config: The ``fuzzyroe`` block of the configuration.
        tensors: Their tensors, under the names of ``fuzzyroe.state_dict``.
        path: Folder or hub id that the router's own files, such as a rule base, are in.
    """

    config: FuzzyRoEConfig
    tensors: dict[str, Tensor]
    path: str

    def build_router(self, text_config: Any) -> Router:
        """Make the router for a decoder, given its configuration; its tensors are still to be loaded."""
        return get_router_class(self.config.router).build(
            self.config.router_options,
            text_config.num_hidden_layers,
            text_config.hidden_size,
            lambda name: str(cached_file(self.path, name)),
        )

    def save(self, folder: Path, text_config: Any) -> dict[str, Any]:
        """Write tensors and the router's own files to a checkpoint's folder, and give the ``fuzzyroe`` block for it."""
        save_routing(self.tensors, folder / ROUTING_FILE)
        self.build_router(text_config).save_options(folder)
        return replace(self.config, base_model=None).to_dict()


def read_routing(path: str, block: dict[str, Any]) -> StoredRouting:
    """Read the routing that the ``fuzzyroe`` block of a checkpoint's configuration describes.

    Raises:
        OSError: If its file of tensors is missing.
        ValueError: If the block is damaged, or of another version.
    """
    config = FuzzyRoEConfig.from_dict(block)
    return StoredRouting(config, load_routing(str(cached_file(path, ROUTING_FILE))), path)


def import_routing(weights: Mapping[str, Tensor], source: str) -> tuple[StoredRouting | None, dict[str, Tensor]]:
    """Take what RoE's code added to a LLaVA apart from the LLaVA, and make it routing of ours.

    Args:
        weights, source: Stored name -> tensor; folder or hub id that they come from.

    Returns:
        Adapters and router, None if nothing was added; all other weights.

    Raises:
        ValueError: If a tensor of RoE's has no counterpart here, or there is no adapter.

    Reference:
        RoE (arXiv:2407.14093); names and shapes as its training code saves them.
    """
    names = {name: ROE_NAMES.rename(name) for name in weights}
    tensors = {new: weights[name] for name, new in names.items() if new is not None}
    others = {name: weights[name] for name, new in names.items() if new is None}
    if not tensors:
        return None, others
    unknown, first = [name for name, new in names.items() if new == name], "layers.0.adapter.down.weight"
    if unknown or first not in tensors:
        raise ValueError(
            f"{source} has weights of RoE that are not known: {list_names(unknown)}; adapters (conv_A, conv_B) and a "
            "router (expert.0) per layer and two routing tokens are read. Save it with RoE's own training code."
        )
    for name in tensors:
        if name.startswith("router.source.tokens."):
            tensors[name] = tensors[name].reshape(-1)  # embeddings of one row there, (1, D); vectors here, (D,)
    options = {"summary": "tokens", "compat": COMPAT.to_dict()}
    width = tensors[first].shape[0]
    config = FuzzyRoEConfig(adapter_width=width, router="linear", router_options=options, stage="RoE")
    return StoredRouting(config, tensors, source), others
