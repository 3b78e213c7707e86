"""Reading a checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.model.checkpoints.backbone import Backbone, check_complete
from llava.model.checkpoints.chain import read_chain
from llava.model.checkpoints.compose import compose_config
from llava.model.checkpoints.joined_config import extend_vocabulary
from llava.model.checkpoints.key_maps import HEAD, TOWER, to_released
from llava.model.checkpoints.layout import LORA_CONFIG, CheckpointLayout, is_language_model, read_config_dict
from llava.model.checkpoints.low_rank import LowRankUpdate, check_updates, read_updates
from llava.model.checkpoints.original import build_config, locate_tower
from llava.model.checkpoints.projector import read_projector
from llava.model.checkpoints.roe import import_routing, split_routing
from llava.model.checkpoints.stored_routing import StoredRouting, read_routing
from llava.model.checkpoints.tokenizer import has_tokenizer, read_tokenizer
from llava.model.checkpoints.vision import VisionSettings, read_vision_weights
from llava.model.checkpoints.weight_files import find_file, read_tensors, read_weights

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def read_backbone(path: str | Path, model_base: str | None = None) -> Backbone:
    """Read a checkpoint; weights stay in their files until they are used.

    Args:
        path: Folder or hub id of a LLaVA, or of a projector, low-rank updates, or routing that names its base.
        model_base: Folder or hub id of what the last three belong to, instead of what they name.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If the parts do not fit together; lists missing, unexpected and misshapen weights.
    """
    chain = read_chain(path, model_base)
    config, tokenizer = _read_text_side(chain)
    weights, updates, added = _read_stored(chain)
    if not any(name.startswith(TOWER) for name in weights):
        tower = _find_tower(chain)
        weights |= {} if tower is None else to_released(read_vision_weights(tower), tower)
    if any(layout.kind != "transformers" for layout in chain):
        extend_vocabulary(weights, config.text_config.vocab_size)
    if config.tie_word_embeddings:
        weights.pop(HEAD, None)  # stored or not, it is the embeddings
    check_complete(weights, config, " with ".join(layout.path for layout in chain))
    for each in updates:
        check_updates({name: tuple(tensor.shape) for name, tensor in weights.items()}, each, str(path))
    routing = _read_routing(chain, added)
    if routing is not None:
        config.fuzzyroe = routing.config.to_dict()
    holder = next(layout for layout in chain if layout.has_weights or layout.projector or layout.lora)
    return Backbone(
        config,
        weights,
        tokenizer,
        _read_image_processor(chain),
        holder.path,
        updates,
        routing,
        _read_generation_config(chain),
    )


def read_config_and_tokenizer(
    path: str | Path, settings: VisionSettings | None = None, model_base: str | None = None
) -> tuple[LlavaConfig, Any]:
    """Configuration and tokenizer of a LLaVA, or of the LLaVA that a language model will become; no weights are read.

    Args:
        path: Folder or hub id of either.
        settings: What the language model will see with; not for a LLaVA.
        model_base: As for ``read_backbone``.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If a language model comes without ``settings``.
    """
    if model_base is None and is_language_model(read_config_dict(path)):
        if settings is None:
            raise ValueError(
                f"{path} is a language model; a CLIP checkpoint must be named as its vision tower, LLaVA-1.5's is "
                "openai/clip-vit-large-patch14-336."
            )
        return compose_config(path, settings)
    return _read_text_side(read_chain(path, model_base))


def _read_text_side(chain: list[CheckpointLayout]) -> tuple[LlavaConfig, Any]:
    with_tokenizer = next((layout for layout in chain if has_tokenizer(layout.path)), chain[0])
    tokenizer = read_tokenizer(with_tokenizer.path)
    described = next((layout for layout in chain if layout.kind in ("transformers", "original")), None)
    if described is None:
        raise ValueError(
            f"Neither of {' and '.join(layout.path for layout in chain)} is a LLaVA: no config.json says which vision "
            "tower is meant. Name a LLaVA as the base, or add the config.json of the training run."
        )
    if described.kind == "original":
        return build_config(described.config, described.path, tokenizer), tokenizer
    return LlavaConfig.from_pretrained(described.path), tokenizer


def _read_stored(
    chain: list[CheckpointLayout],
) -> tuple[dict[str, Tensor], tuple[dict[str, LowRankUpdate], ...], dict[str, Tensor]]:
    """Weights of the last of a chain with what the others replace, their updates, and what RoE added to the last."""
    added, stored = split_routing(read_weights(chain[-1].path))
    weights = to_released(stored, chain[-1].path)
    updates: list[dict[str, LowRankUpdate]] = []
    for layout in reversed(chain[:-1]):
        replaced: dict[str, Tensor] = {}
        if layout.projector is not None:
            replaced |= read_projector(layout.projector)
        if layout.others is not None:
            replaced |= to_released(read_tensors(layout.others), layout.others)
        own: dict[str, LowRankUpdate] = {}
        if layout.lora is not None:
            own, whole = read_updates(layout.lora, str(find_file(layout.path, LORA_CONFIG)))
            replaced |= whole
        weights |= replaced
        updates = [{name: u for name, u in each.items() if name not in replaced} for each in updates] + [own]
    return weights, tuple(each for each in updates if each), added


def _read_routing(chain: list[CheckpointLayout], added: dict[str, Tensor]) -> StoredRouting | None:
    """Routing that the first of a chain describes which does, else what RoE's code added to the weights."""
    described = next((layout for layout in chain if layout.config.get("fuzzyroe")), None)
    if described is not None:
        return read_routing(described.path, described.config["fuzzyroe"])
    return import_routing(added, chain[-1].path) if added else None


def _find_tower(chain: list[CheckpointLayout]) -> str | None:
    """The vision tower that a checkpoint names which does not hold it."""
    named = [(layout.config.get("mm_vision_tower"), layout.path) for layout in chain]
    found = [locate_tower(name, path) for name, path in named if name]
    return next((tower for tower in found if Path(tower).is_dir()), found[0] if found else None)


def _read_image_processor(chain: list[CheckpointLayout]) -> CLIPImageProcessorPil:
    paths = [layout.path for layout in chain if any(find_file(layout.path, name) for name in PROCESSOR_FILES)]
    tower = _find_tower(chain)
    if not paths and tower is None:
        raise FileNotFoundError(
            f"{chain[0].path} has no {PROCESSOR_FILES[0]}; it says how images are resized. Copy it from the vision "
            "tower's checkpoint."
        )
    return CLIPImageProcessorPil.from_pretrained(paths[0] if paths else tower)


def _read_generation_config(chain: list[CheckpointLayout]) -> GenerationConfig | None:
    paths = [layout.path for layout in chain if find_file(layout.path, "generation_config.json")]
    return GenerationConfig.from_pretrained(paths[0]) if paths else None
