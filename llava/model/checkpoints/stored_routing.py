"""Adapters and router of a checkpoint, read but not yet attached to a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.routers import get_router_class
from fuzzyroe.routers.base import Router
from fuzzyroe.state_dict import load_routing, save_routing
from llava.model.checkpoints.weights import find_needed

ROUTING_FILE = "routing.safetensors"


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
        """Make the router for a decoder; its tensors are still to be loaded.

        Args:
            text_config: Configuration of the decoder.
        """
        return get_router_class(self.config.router).build(
            self.config.router_options,
            text_config.num_hidden_layers,
            text_config.hidden_size,
            lambda name: find_needed(self.path, name),
        )

    def save(self, folder: Path, text_config: Any) -> dict[str, Any]:
        """Write tensors and the router's own files beside the weights of the backbone.

        Args:
            folder: Folder of a checkpoint.
            text_config: Configuration of the decoder.

        Returns:
            The ``fuzzyroe`` block for this folder.
        """
        save_routing(self.tensors, folder / ROUTING_FILE)
        self.build_router(text_config).save_options(folder)
        return replace(self.config, base_model=None).to_dict()


def read_routing(path: str, block: dict[str, Any]) -> StoredRouting:
    """Read the routing that a configuration describes.

    Args:
        path: Folder or hub id of the checkpoint.
        block: The ``fuzzyroe`` block of its configuration.

    Raises:
        OSError: If its file of tensors is missing.
        ValueError: If the block is damaged, or of another version.
    """
    config = FuzzyRoEConfig.from_dict(block)
    return StoredRouting(config, load_routing(find_needed(path, ROUTING_FILE)), path)
