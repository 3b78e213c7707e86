"""The output folder of a stage: written beside its place, verified, renamed once whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import Trainer

from fuzzyroe.attach import find_decoder
from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.rules import save_rule_base
from fuzzyroe.state_dict import routing_names, routing_state_dict, save_routing
from llava.model.builder import ROUTING_FILE, Checkpoint
from llava.train.engine import gather_parameters
from llava.train.param_groups import parameters_by_part
from llava.train.stages import Stage

BACKBONE_PARTS = ("vision_tower", "projector", "decoder")


def save_stage(trainer: Trainer, checkpoint: Checkpoint, stage: Stage, output: Path, summary: dict[str, Any]) -> None:
    """Write a stage's checkpoint; call on all ranks.

    The folder holds ``config.json`` with a ``fuzzyroe`` block, the rule base, ``routing.safetensors``, tokenizer and
    image processor; the backbone's weights, under stock names, only if the stage trained any of them.

    Args:
        trainer: Trainer whose model is saved; its ``args.output_dir`` is the folder being written.
        checkpoint: What the stage started from.
        stage: What was trained.
        output: Final folder; an earlier one is replaced only when the new one is complete.
        summary: Facts for ``stage.json``.
    """
    partial, model = Path(trainer.args.output_dir), trainer.model
    is_routed = stage.routing != "off"
    writes_backbone = not is_routed or bool(set(stage.trains) & set(BACKBONE_PARTS))
    parts = parameters_by_part(model)
    backbone = [parts[part] for part in BACKBONE_PARTS] if writes_backbone else []
    tensors = gather_parameters({name: p for named in backbone for name, p in named.items()})
    adapters = gather_parameters(parts["adapter"])
    if trainer.args.process_index == 0:
        partial.mkdir(parents=True, exist_ok=True)
        base = None if writes_backbone else _relative_base(checkpoint.weights_path, output)
        if is_routed:
            _save_routing(model, adapters, stage, base, partial)
        if writes_backbone:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            model.save_pretrained(partial, state_dict=tensors, save_original_format=False)  # empties ``tensors``
            _verify_weights(partial, shapes)
        else:
            model.config.save_pretrained(partial)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        checkpoint.tokenizer.save_pretrained(partial)
        checkpoint.image_processor.save_pretrained(partial)
        if trainer.args.fingerprint:
            (partial / "fingerprint").write_text(trainer.args.fingerprint + "\n")
        write_json(partial / "stage.json", summary)
        replace_folder(partial, output)
    trainer.accelerator.wait_for_everyone()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, path)


def replace_folder(partial: Path, final: Path) -> None:
    """Put a complete folder into its final place; what stood there is removed only afterwards."""
    for leftover in partial.glob("checkpoint-*"):
        shutil.rmtree(leftover)
    old = final.with_name(final.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    if old.exists():
        shutil.rmtree(old)


def _save_routing(model: Any, adapters: dict[str, Tensor], stage: Stage, base: str | None, folder: Path) -> None:
    decoder = find_decoder(model)
    router, names = decoder.router, routing_names(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    save_routing(routing_state_dict(model, {**adapters, **buffers}), folder / ROUTING_FILE)
    save_rule_base(router.rule_base, folder / "rule_base.yaml")
    width = next(tensor.shape[0] for name, tensor in adapters.items() if name.endswith("down.weight"))
    config = FuzzyRoEConfig(
        adapter_width=width, num_budgets=len(router.budget_rates), base_model=base, stage=stage.name
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
