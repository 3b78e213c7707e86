"""Adapters and routers of checkpoints that RoE's own code trained, under the names of ``fuzzyroe.state_dict``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.routers.roe.compat import PUBLISHED
from llava.model.checkpoints.names import list_names
from llava.model.checkpoints.stored_routing import StoredRouting

FIRST_ADAPTER = "layers.0.adapter.down.weight"
TOKENS = {"router.source.tokens.image", "router.source.tokens.text"}

ROUTING_NAMES = (
    (r"model\.layers\.(\d+)\.adapter_MHA\.conv_A\.weight", r"layers.\1.adapter.down.weight"),
    (r"model\.layers\.(\d+)\.adapter_MHA\.conv_B\.weight", r"layers.\1.adapter.up.weight"),
    (r"model\.layers\.(\d+)\.adapter_MHA_router\.expert\.0\.weight", r"router.layers.\1.weight"),
    (r"model\.adapter_image_token\.weight", "router.source.tokens.image"),
    (r"model\.adapter_text_token\.weight", "router.source.tokens.text"),
)
"""RoE's names -> ours, those of ``fuzzyroe.state_dict``; routing tokens are embeddings of one row there."""

COMPAT = replace(PUBLISHED, batch_decides_together=False)
"""The published behaviour that the weights were trained for; a row is nevertheless answered as it is alone."""

_FOREIGN = re.compile(r"model\.(?:layers\.\d+\.adapter_MHA|adapter_image_token|adapter_text_token)")


def split_routing(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take what RoE adds to a LLaVA apart from the LLaVA.

    Args:
        weights: Stored name -> tensor.

    Returns:
        RoE's tensors; all others.
    """
    added = {name: tensor for name, tensor in weights.items() if _FOREIGN.match(name)}
    return added, {name: tensor for name, tensor in weights.items() if name not in added}


def import_routing(added: Mapping[str, Tensor], source: str) -> StoredRouting:
    """Describe and rename what RoE added, so that it is routing of ours.

    Args:
        added: RoE's tensors under RoE's names.
        source: Folder or hub id that they come from.

    Raises:
        ValueError: If a tensor has no counterpart here, or there is no adapter.

    Reference:
        RoE (arXiv:2407.14093); names and shapes as its training code saves them.
    """
    tensors = {_rename(name): tensor for name, tensor in added.items()}
    unknown = [name for name in added if _rename(name) == name]
    if unknown or FIRST_ADAPTER not in tensors:
        raise ValueError(
            f"{source} has weights of RoE that are not known: {list_names(unknown)}; adapters (conv_A, conv_B) and a "
            "router (expert.0) per layer and two routing tokens are read. Save it with RoE's own training code."
        )
    # embeddings of one row there, vectors here
    for name in tensors.keys() & TOKENS:
        tensors[name] = tensors[name].reshape(-1)  # (1, D) to (D,)
    options = {"summary": "tokens", "compat": COMPAT.to_dict()}
    width = tensors[FIRST_ADAPTER].shape[0]
    config = FuzzyRoEConfig(adapter_width=width, router="linear", router_options=options, stage="RoE")
    return StoredRouting(config, tensors, source)


def _rename(name: str) -> str:
    for pattern, replacement in ROUTING_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name
