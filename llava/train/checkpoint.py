"""The output folder of a stage: written beside its place, verified, renamed once whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Trainer

from fuzzyroe.attach import find_decoder
from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.routers import get_router_name
from fuzzyroe.state_dict import routing_names, routing_state_dict, save_routing
from llava.model.builder import Checkpoint
from llava.model.checkpoints.key_maps import original_name
from llava.model.checkpoints.stored_routing import ROUTING_FILE
from llava.report.page import write_stage_page
from llava.train.engine import gather_parameters
from llava.train.lora import save_lora
from llava.train.param_groups import parameters_by_part
from llava.train.stages import Stage
from llava.train.step_checkpoint import SAVING, list_checkpoints

BACKBONE_PARTS = ("vision_tower", "projector", "decoder")

PROJECTOR_FILE = "mm_projector.bin"
"""What a stage that trains the projector alone writes besides; the name and the form are LLaVA's."""


def save_stage(trainer: Trainer, checkpoint: Checkpoint, stage: Stage, output: Path, summary: dict[str, Any]) -> None:
    """Write a stage's checkpoint; call on all ranks.

    Args:
        trainer: Trainer whose model is saved; its ``args.output_dir`` is the folder being written.
        checkpoint: What the stage started from.
        stage: What was trained.
        output: Final folder; an earlier one is replaced only when the new one is complete.
        summary: Facts for ``stage.json``.
    """
    partial = Path(trainer.args.output_dir)
    write_model(trainer, checkpoint, stage, partial, output)
    if trainer.args.process_index == 0:
        if trainer.args.fingerprint:
            (partial / "fingerprint").write_text(trainer.args.fingerprint + "\n")
        write_json(partial / "stage.json", summary)
        write_stage_page(partial)
        replace_folder(partial, output)
    trainer.accelerator.wait_for_everyone()


def write_model(trainer: Trainer, checkpoint: Checkpoint, stage: Stage, folder: Path, output: Path) -> None:
    """Write what ``load_checkpoint`` reads; call on all ranks.

    The folder holds ``config.json``, tokenizer and image processor. A routed model adds a ``fuzzyroe`` block in the
    configuration, ``routing.safetensors`` and the router's files. Backbone weights are there, under stock names, only
    if the stage trained any of them as a whole; of a stage with low-rank updates these, in peft's format, and the
    projector. A projector trained alone is written under LLaVA's names as well.

    Args:
        trainer: Trainer whose model is written.
        checkpoint: What the stage started from.
        stage: What was trained.
        folder: Folder to write to.
        output: Where it will lie in the end; a local base model is named relative to that.
    """
    model = trainer.model
    is_routed = stage.routing != "off"
    has_updates = "lora" in stage.trains
    writes_backbone = not has_updates and (not is_routed or bool(set(stage.trains) & set(BACKBONE_PARTS)))
    parts = parameters_by_part(model)
    kept = {*stage.trains, "projector"} if has_updates else set(stage.trains)  # the base may have another, or none
    written = [part for part in BACKBONE_PARTS if writes_backbone or part in kept]
    tensors = gather_parameters({name: p for part in written for name, p in parts[part].items()})
    updates = gather_parameters(parts["lora"])
    routing = gather_parameters(_routing_parameters(model) if is_routed else {})
    if trainer.args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        base = None if writes_backbone else _relative_base(checkpoint.weights_path, output)
        if is_routed:
            _save_routing(model, routing, stage, base, folder)
        if stage.trains == ("projector",):
            _save_projector({name: tensors[name] for name in parts["projector"]}, folder)
        if writes_backbone:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            model.save_pretrained(folder, state_dict=tensors, save_original_format=False)  # empties ``tensors``
            _verify_weights(folder, shapes)
        else:
            model.config.save_pretrained(folder)
            if has_updates:
                save_lora(model, updates, tensors, folder, base)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        checkpoint.image_processor.save_pretrained(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, path)


def replace_folder(partial: Path, final: Path) -> None:
    """Put a complete folder into its final place; what stood there is removed only afterwards."""
    for leftover in (*list_checkpoints(partial), partial / SAVING):
        shutil.rmtree(leftover, ignore_errors=True)
    old = final.with_name(final.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    if old.exists():
        shutil.rmtree(old)


def _save_projector(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the projector as LLaVA's pretraining does."""
    torch.save({original_name(name): tensor for name, tensor in tensors.items()}, folder / PROJECTOR_FILE)


def _routing_parameters(model: Any) -> dict[str, Tensor]:
    """Parameters of adapters and router, possibly sharded, under their names in the model."""
    names = routing_names(model)
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def _save_routing(model: Any, parameters: dict[str, Tensor], stage: Stage, base: str | None, folder: Path) -> None:
    """Write tensors and files of adapters and router, and describe them in the model's config."""
    decoder = find_decoder(model)
    router, names = decoder.router, routing_names(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    save_routing(routing_state_dict(model, {**parameters, **buffers}), folder / ROUTING_FILE)
    router.save_files(folder)
    width = next(tensor.shape[0] for name, tensor in parameters.items() if name.endswith("adapter.down.weight"))
    config = FuzzyRoEConfig(
        adapter_width=width,
        router=get_router_name(router),
        router_options=router.settings(),
        skip_unit=decoder.layers[0].skip_unit,
        base_model=base,
        stage=stage.name,
    )
    model.config.fuzzyroe = config.to_dict()


def _relative_base(weights_path: str, output: Path) -> str:
    """A local base is named relative to the checkpoint, so that both can be moved together."""
    if not Path(weights_path).is_dir():
        return weights_path
    return os.path.relpath(Path(weights_path).resolve(), output.resolve())


def _verify_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Re-open what was written and compare names and shapes with the model's.

    Raises:
        RuntimeError: If they differ, as when a sharded tensor was saved empty.
    """
    written: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            written |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    if written != shapes:
        wrong = sorted(set(written.items()) ^ set(shapes.items()))[:5]
        raise RuntimeError(f"Saved weights in {folder} differ in name or shape from the model's: {wrong}.")
