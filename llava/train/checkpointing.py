"""Checkpoints of a stage: its output folder, whole or not there, and the steps that an interrupted run resumes from.

A stage writes into ``OUTPUT.partial``, which is verified and renamed to ``OUTPUT`` last. A step checkpoint is the
folder ``OUTPUT.partial/checkpoint-N``. Its manifest is written last, once every process has written its share, and is
removed first; so a process killed at any moment leaves either a whole checkpoint or one without a manifest, which is
passed over. The manifest lists every file with its size, which tells a copy that was cut short, and what the run was
asked for, which tells another run's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from fuzzyroe.attach import find_decoder
from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.routers import get_router_name
from fuzzyroe.state_dict import routing_names, routing_state_dict, save_routing
from llava.files import flush_to_disk, write_json
from llava.model.builder import Checkpoint
from llava.model.checkpoints.routing import ROUTING_FILE
from llava.model.families import family_of
from llava.train.arguments import Arguments, stage_of
from llava.train.parameters import parameters_by_part, save_lora
from llava.train.stages import Stage, StageInputError
from llava.train.zero3 import full_shape, gather_parameters

logger = logging.getLogger(__name__)

BACKBONE_PARTS = ("vision_tower", "projector", "decoder")

PROJECTOR_FILE = "mm_projector.bin"
"""What a stage that trains the projector alone writes besides; the name and the form are LLaVA's."""

MANIFEST, PREFIX = "manifest.json", "checkpoint-"
_STEP = re.compile(rf"{PREFIX}\d+")

BYTES_PER_TRAINED = 16
"""Of a step checkpoint, per trained parameter: weight, two moments and gradient scale of AdamW in float32."""

TRAINING_FLAGS = tuple(
    "seed data_seed per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs learning_rate "
    "mm_projector_lr lr_scheduler_type warmup_steps weight_decay optim max_grad_norm bf16 fp16 model_max_length "
    "group_by_modality_length lora_r lora_alpha lora_dropout bits double_quant quant_type".split()
)
"""Training flags on which a step depends; another value makes another run."""


def partial_folder(output: Path) -> Path:
    """Where a stage's output is written until it is whole, beside its final place."""
    return output.with_name(output.name + ".partial")


def save_stage(trainer: Any, checkpoint: Checkpoint, stage: Stage, output: Path, summary: dict[str, Any]) -> None:
    """Write a stage's checkpoint; call on all ranks.

    Args:
        trainer: Its ``args.output_dir`` is the folder being written.
        checkpoint, stage: What the stage started from, with the model as it is now; what was trained.
        output, summary: Final folder, of which an earlier one is kept till the end; facts for ``stage.json``.
    """
    partial, is_writer = Path(trainer.args.output_dir), trainer.args.process_index == 0
    write_model(checkpoint, stage, partial, output, is_writer)
    if is_writer:
        from llava.report.page import write_stage_page  # matplotlib and jinja2, on one rank and at the end

        if trainer.args.run_hash:
            (partial / "run_hash").write_text(trainer.args.run_hash + "\n")
        write_json(partial / "stage.json", summary)
        write_stage_page(partial)
        _replace_folder(partial, output)
    trainer.accelerator.wait_for_everyone()


def write_model(checkpoint: Checkpoint, stage: Stage, folder: Path, output: Path, is_writer: bool) -> None:
    """Write what ``load_checkpoint`` reads; call on all ranks.

    The folder holds ``config.json``, tokenizer and image processor. A routed model adds a ``fuzzyroe`` block in the
    configuration, ``routing.safetensors`` and the router's files. Backbone weights are there, under stock names, only
    if the stage trained any of them as a whole; of a stage with LoRA its weights, in peft's format, and the projector.
    A projector trained alone is written under LLaVA's names as well.

    Args:
        checkpoint, stage: What the stage started from, with the model as it is now; what was trained.
        folder, output: Where it is written, and where it will lie, which a local base model is named relative to.
        is_writer: Whether this rank writes; the others take part in gathering.
    """
    model, parts = checkpoint.model, parameters_by_part(checkpoint.model)
    is_routed, has_lora = stage.routing != "off", "lora" in stage.trains
    writes_backbone = not has_lora and (not is_routed or bool(set(stage.trains) & set(BACKBONE_PARTS)))
    # Beside LoRA the projector is written even if it did not train: the base may have another one, or none.
    kept = {*stage.trains, "projector"} if has_lora else set(stage.trains)
    written = [part for part in BACKBONE_PARTS if writes_backbone or part in kept]
    tensors = gather_parameters({name: p for part in written for name, p in parts[part].items()})
    lora = gather_parameters(parts["lora"])
    routing = gather_parameters({**parts["adapter"], **parts["router"]} if is_routed else {})
    if not is_writer:
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = None if writes_backbone else checkpoint.weights_path
    if base is not None and Path(base).is_dir():  # relative, so that both can be moved together
        base = os.path.relpath(Path(base).resolve(), output.resolve())
    if is_routed:
        _save_routing(model, routing, stage, base, folder)
    if stage.trains == ("projector",):
        original_name = family_of(model.config).original_name
        torch.save({original_name(name): tensors[name] for name in parts["projector"]}, folder / PROJECTOR_FILE)
    if writes_backbone:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        model.save_pretrained(folder, state_dict=tensors, save_original_format=False)  # empties ``tensors``
        _verify_shapes(sorted(folder.glob("model*.safetensors")), shapes)
    elif base is not None and has_lora:
        save_lora(model, lora, tensors, folder, base)
    _save_settings(checkpoint, folder)


def dry_run_save(trainer: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """Write one of everything that the stage will write and read it again; call on all ranks before the first step.

    Raises:
        StageInputError: If ``folder`` has not enough room for what the stage will write.
        RuntimeError: If a tensor comes back with another shape.
    """
    trained = {name: p for name, p in checkpoint.model.named_parameters() if p.requires_grad}
    tensors = gather_parameters(dict(list(trained.items())[:1]))
    if trainer.args.process_index != 0:
        return
    with TemporaryDirectory(dir=folder) as target:
        _save_settings(checkpoint, Path(target))
        save_file(tensors, Path(target, "one.safetensors"))
        _verify_shapes([Path(target, "one.safetensors")], {name: full_shape(trained[name]) for name in tensors})
    count = sum(math.prod(full_shape(parameter)) for parameter in trained.values())
    needed = 4 * count
    if trainer.args.save_strategy.value != "no":
        limits = [c.limit or 1 for c in trainer.callback_handler.callbacks if isinstance(c, StepCheckpoints)]
        needed += (1 + sum(limits)) * BYTES_PER_TRAINED * count  # the newest comes before the oldest goes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StageInputError(
            f"{folder} has {free / 2**30:.1f} GiB free, this stage will write {needed / 2**30:.1f} GiB; make room, "
            "or save fewer step checkpoints (--save_total_limit, --save_strategy no)."
        )


def _replace_folder(partial: Path, final: Path) -> None:
    """Put a complete folder into its final place; what stood there is removed only afterwards."""
    for leftover in list_checkpoints(partial):  # steps belong to the run, not to its result
        remove_checkpoint(leftover)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    # a kill between the two renames leaves the old one as OUTPUT.old, from where the scripts put it back
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def _save_settings(checkpoint: Checkpoint, folder: Path) -> None:
    """Write everything but weights."""
    model = checkpoint.model
    for settings in (model.config, model.generation_config, checkpoint.tokenizer, checkpoint.image_processor):
        if settings is not None:
            settings.save_pretrained(folder)


def _save_routing(model: Any, parameters: dict[str, Tensor], stage: Stage, base: str | None, folder: Path) -> None:
    """Write tensors and files of adapters and router, and describe them in the model's config."""
    decoder: Any = find_decoder(model)
    names = routing_names(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    save_routing(routing_state_dict(model, {**parameters, **buffers}), folder / ROUTING_FILE)
    config = FuzzyRoEConfig(
        adapter_width=next(t.shape[0] for name, t in parameters.items() if name.endswith("adapter.down.weight")),
        router=get_router_name(decoder.router),
        router_options=decoder.router.save_options(folder),
        skip_unit=decoder.layers[0].skip_unit,
        base_model=base,
        stage=stage.name,
    )
    model.config.fuzzyroe = config.to_dict()


def _verify_shapes(files: list[Path], shapes: dict[str, tuple[int, ...]]) -> None:
    """Open what was written again; RuntimeError if names or shapes differ, as when a sharded tensor was saved empty."""
    written: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            written |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    if written != shapes:
        wrong = sorted(set(written.items()) ^ set(shapes.items()))[:5]
        raise RuntimeError(f"Weights saved beside {files[:1]} differ in name or shape from the model's: {wrong}.")


# Step checkpoints, and the run that they belong to.


@dataclass(eq=False)
class StepCheckpoints(TrainerCallback):
    """Give what Trainer saves at a step its manifest, once all ranks have written, and remove the oldest.

    Trainer's own limit is left out: it would remove the last whole checkpoint before the new one has its manifest.

    Attributes:
        partial, run: ``OUTPUT.partial``, and the run as ``describe_run`` says.
        limit: How many are kept; None keeps all.
        facts: Gives what a resumed run needs besides its state, as JSON knows it.
    """

    partial: Path
    run: dict[str, Any]
    limit: int | None
    facts: Callable[[], dict[str, Any]]

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Make room for a step that is saved; the last one is not, as the stage's output follows at once."""
        if state.global_step >= state.max_steps:
            control.should_save = False
        if control.should_save:
            if state.is_world_process_zero:
                remove_checkpoint(self.partial / f"{PREFIX}{state.global_step}")  # left by a run that got this far
            PartialState().wait_for_everyone()

    on_epoch_end = on_step_end  # the same for a save at the end of an epoch

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the manifest."""
        PartialState().wait_for_everyone()  # every process has written its share
        if state.is_world_process_zero:
            publish(self.partial / f"{PREFIX}{state.global_step}", self.run, self.facts())
            rotate(self.partial, self.limit)
        PartialState().wait_for_everyone()


def publish(folder: Path, run: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Give a written step checkpoint its manifest, with what ``StepCheckpoints`` says; call on one process."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:  # on the disk before the manifest speaks of them, so that a power cut keeps that order
        flush_to_disk(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_json(folder / MANIFEST, {"run": run, "facts": facts, "sizes": sizes})
    flush_to_disk(folder)
    return folder


def remove_checkpoint(folder: Path) -> None:
    """Remove a step checkpoint, its manifest first, so that a kill on the way leaves none that seems whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(partial: Path, limit: int | None) -> None:
    """Remove all but the newest ``limit`` step checkpoints; none of them if ``limit`` is None."""
    for folder in [] if limit is None else list_checkpoints(partial)[: -max(limit, 1)]:
        remove_checkpoint(folder)


def list_checkpoints(partial: Path) -> list[Path]:
    """Step checkpoints of a folder by their step, oldest first, whole or not."""
    return sorted((path for path in partial.glob(f"{PREFIX}*") if _STEP.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Optimizer steps that a step checkpoint stands for, read from its name."""
    return int(folder.name.removeprefix(PREFIX))


def find_fault(folder: Path) -> str | None:
    """Why a folder is no step checkpoint that can be resumed, None if it is a whole one."""
    if not _STEP.fullmatch(folder.name):
        return "its name has no step"
    try:
        sizes = read_manifest(folder)["sizes"]
    except (OSError, ValueError, KeyError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``publish`` wrote: ``run``, ``facts`` and ``sizes``."""
    return json.loads((folder / MANIFEST).read_text())


def describe_run(arguments: Arguments) -> dict[str, Any]:
    """What the steps of a run depend on, as JSON knows it; two runs that agree in it take the same steps."""
    model_args, data_args, stage_args, training_args = arguments
    stage = stage_of(arguments)
    described = {
        "stage": stage.name,
        "trains": stage.trains,
        "world_size": training_args.world_size,
        "model_name_or_path": model_args.model_name_or_path,
        "version": model_args.version,
        "data_path": data_args.data_path,
        "data_bytes": Path(data_args.data_path).stat().st_size,
        **asdict(stage_args),
        **{name: getattr(training_args, name) for name in TRAINING_FLAGS},
    }
    return json.loads(json.dumps(described, default=str))


def find_resume(asked: str, partial: Path, run: dict[str, Any]) -> Path | None:
    """Find the step checkpoint that a run goes on from.

    Args:
        asked: ``auto``: the newest whole one in ``partial``, or None if there is none; ``none``; or a folder.
        partial, run: ``OUTPUT.partial``, and the run as ``describe_run`` says.

    Raises:
        StageInputError: If the folder asked for is no whole checkpoint, or the checkpoint belongs to another run.
    """
    if asked == "none":
        return None
    # newest first; one that was being written when its run was killed is passed over
    for folder in reversed(list_checkpoints(partial)) if asked == "auto" else [Path(asked)]:
        fault = find_fault(folder)
        if fault is None:
            _refuse_other_run(folder, run)
            return folder
        if asked != "auto":
            raise StageInputError(
                f"--resume_from_checkpoint {asked} is no whole step checkpoint: {fault}. Name a folder "
                "OUTPUT.partial/checkpoint-N, or use auto or none."
            )
        logger.warning("%s is passed over: %s", folder, fault)
    return None


def begin_folder(partial: Path, asked: str, run: dict[str, Any]) -> Path | None:
    """Do as ``find_resume``; remove what cannot be resumed, everything if nothing is. Call on one process."""
    resumed = find_resume(asked, partial, run)
    if resumed is None:
        shutil.rmtree(partial, ignore_errors=True)
    for folder in list_checkpoints(partial):
        if find_fault(folder) is not None:
            remove_checkpoint(folder)
    partial.mkdir(parents=True, exist_ok=True)
    return resumed


def _refuse_other_run(folder: Path, run: dict[str, Any]) -> None:
    """Compare what a checkpoint's run was asked for with this one."""
    saved, anew = read_manifest(folder)["run"], "--resume_from_checkpoint none"
    if saved["stage"] != run["stage"]:
        raise StageInputError(
            f"{folder} was saved by stage {saved['stage']}, this is stage {run['stage']}; a stage goes on from its own "
            f"checkpoints only. Name what the stage before it wrote in the end as --model_name_or_path, with {anew}."
        )
    if saved["world_size"] != run["world_size"]:
        raise StageInputError(
            f"{folder} was saved by {saved['world_size']} processes, there are {run['world_size']} now; each holds its "
            f"own share of the optimizer. Start {saved['world_size']} processes, or begin anew with {anew}; between "
            "stages their number may change."
        )
    wrong = [name for name in sorted({*saved, *run}) if saved.get(name) != run.get(name)]
    if wrong:
        differing = ", ".join(f"{name} {saved.get(name)} (now {run.get(name)})" for name in wrong[:4])
        raise StageInputError(
            f"{folder} was saved by a run with {differing}; give the same flags to go on, or {anew} to begin anew."
        )
