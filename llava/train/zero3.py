"""DeepSpeed ZeRO-3 under a trainer: its communication and engine, whole parameters, layers that ranks leave out."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import deepspeed_init

from fuzzyroe.attach import find_decoder_layers
from llava.model.llava_llama import make_text_batches_safe

Result = TypeVar("Result")


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed, the only place that does; ImportError, which says how to install it, if it is missing."""
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            f"--deepspeed was given but DeepSpeed cannot be imported ({error}); install it with "
            "pip install 'fuzzyroe[train]', or leave --deepspeed out to train in one process."
        ) from error
    return deepspeed


def find_dead_build() -> Path | None:
    """Find the lock that a killed build of a DeepSpeed operator left; whoever builds it next would wait for ever.

    torch keeps the lock open while it builds, so one that no process has open is left over. None if there is none, or
    it cannot be told on this system.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions").expanduser()
    locks = sorted(folder.resolve().glob("**/lock"))
    if not locks or not Path("/proc/self/fd").is_dir():
        return None
    held = set()
    for entry in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # the process has ended, or is another user's
            held.add(os.readlink(entry))
    # whether it is still there is asked last: a build may have ended meanwhile
    return next((lock for lock in locks if str(lock) not in held and lock.exists()), None)


def init_communication() -> None:
    """Initialise DeepSpeed's own communication; without it, loading under ZeRO-3 on CPU fails."""
    deepspeed = import_deepspeed()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()


def prepare_model(model: Any, leaves_out_layers: bool, uses_deepspeed: bool) -> None:
    """Have ranks with different batches run a sharded model in step; call before the engine exists.

    A batch without images still passes the vision tower. Where layers are left out, ZeRO-3 gathers each decoder layer
    as a whole, so ranks may run different parts of it, and a part that a rank left out counts as gradient zero.

    Reference:
        DeepSpeed's ZeRO leaf modules, made for mixtures of experts.
    """
    make_text_batches_safe(model)
    if not leaves_out_layers:
        return
    # A leaf module hands its gradients over once the gradient of its input is known, and with a frozen decoder a rank
    # that skips nothing would have no graph at all: the first layer's input must require a gradient.
    model.enable_input_require_grads()
    if uses_deepspeed:
        classes = list({type(layer) for layer in find_decoder_layers(model)})
        import_deepspeed().utils.set_z3_leaf_modules(model, classes)


class ZeroMissingGradients(TrainerCallback):
    """Fill in gradient zero for what a step left out, as ZeRO-3 does, so that one process trains as several do.

    The optimizer leaves a parameter without a gradient alone, but moves one with gradient zero by its momentum.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Fill in the zeros."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None and not is_sharded(parameter):
                parameter.grad = torch.zeros_like(parameter)


def prepare_for_forward(trainer: Any) -> nn.Module:
    """Give a trainer's model an engine for forward passes only, or return the one that training left.

    Under DeepSpeed this is a ZeRO-3 engine without an optimizer; without DeepSpeed the model on its device.
    """
    if not trainer.is_deepspeed_enabled:
        return trainer.model.to(trainer.args.device).eval()
    if trainer.deepspeed is None:
        deepspeed_init(trainer, num_training_steps=0, inference=True)
        trainer.deepspeed = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    trainer.deepspeed.eval()  # gives None, unlike a module's
    return trainer.deepspeed


def describe_engine(trainer: Trainer) -> dict[str, Any]:
    """What is really running: class of the engine, ZeRO stage and number of ranks, read from the live objects."""
    engine = trainer.deepspeed
    return {
        "engine": type(engine).__name__ if engine is not None else type(trainer.model).__name__,
        "zero_stage": engine.zero_optimization_stage() if engine is not None else 0,
        "world_size": distributed.get_world_size() if distributed.is_initialized() else 1,
    }


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds a parameter in shards."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter; a sharded one is empty between uses and keeps its shape in ``ds_shape``."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def map_parameters(named: Mapping[str, Tensor], function: Callable[[Tensor], Result]) -> dict[str, Result]:
    """Apply a function to whole parameters, gathered one at a time where ZeRO-3 has sharded them; call on all ranks."""
    results = {}
    for name, parameter in named.items():
        with _gathered(parameter):
            results[name] = function(parameter.detach())
    return results


def gather_parameters(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full copies of parameters on the CPU; call on all ranks."""
    return map_parameters(named, lambda tensor: tensor.to("cpu", copy=True).contiguous())


def assign_parameters(named: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Give parameters new values, whole ones by name, also where ZeRO-3 has sharded them; call on all ranks."""
    for name, parameter in named.items():
        shape = full_shape(parameter)
        if shape != tuple(tensors[name].shape):
            raise ValueError(
                f"{name} has shape {shape} in the model and {tuple(tensors[name].shape)} in the file; they must be "
                "equal. Use the file that was trained for this model."
            )
        with _gathered(parameter, modifier_rank=0):  # rank 0 writes, the engine hands out the shards
            if not is_sharded(parameter) or distributed.get_rank() == 0:
                parameter.data.copy_(tensors[name])


def _gathered(parameter: Tensor, modifier_rank: int | None = None) -> Any:
    """Context in which a parameter is whole; changes made by ``modifier_rank`` reach the shards."""
    if not is_sharded(parameter):
        return nullcontext()
    return import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=modifier_rank)
