"""The DeepSpeed engine under a trainer: started for forward passes, asked what it really is, gathered from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, distributed, nn
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_init

from fuzzyroe.attach import find_decoder_layers

Result = TypeVar("Result")


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed, the only place that does.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            f"--deepspeed was given but DeepSpeed cannot be imported ({error}); install it with "
            "pip install 'fuzzyroe[train]', or leave --deepspeed out to train in one process."
        ) from error
    return deepspeed


def init_engine_communication() -> None:
    """Initialise DeepSpeed's own communication; without it, loading under ZeRO-3 on CPU fails."""
    deepspeed = import_deepspeed()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()


def make_leaf_layers(model: nn.Module) -> None:
    """Have ZeRO-3 gather each decoder layer as a whole, so that ranks may run different parts of it.

    All ranks then gather the same weights whatever they run, and a part that a rank left out counts as gradient zero.
    Call before the engine exists; without ZeRO-3 the mark has no effect.

    Reference:
        DeepSpeed's ZeRO leaf modules, made for mixtures of experts.
    """
    classes = list({type(layer) for layer in find_decoder_layers(model)})
    import_deepspeed().utils.set_z3_leaf_modules(model, classes)


def prepare_for_forward(trainer: Trainer) -> nn.Module:
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


def map_parameters(named: dict[str, nn.Parameter], function: Callable[[Tensor], Result]) -> dict[str, Result]:
    """Apply a function to whole parameters, gathered one at a time where ZeRO-3 has sharded them; call on all ranks."""
    results = {}
    for name, parameter in named.items():
        if hasattr(parameter, "ds_id"):
            gathered = import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=None)
        else:
            gathered = nullcontext()
        with gathered:
            results[name] = function(parameter.detach())
    return results


def gather_parameters(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Full copies of parameters on the CPU; call on all ranks."""
    return map_parameters(named, lambda tensor: tensor.to("cpu", copy=True).contiguous())


def assign_parameters(named: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Give parameters new values, also where ZeRO-3 has sharded them; call on all ranks.

    Args:
        named: Parameters by name.
        tensors: Whole values, one per parameter.

    Raises:
        ValueError: If a shape differs.
    """
    for name, parameter in named.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != tuple(tensors[name].shape):
            raise ValueError(
                f"{name} has shape {shape} in the model and {tuple(tensors[name].shape)} in the file; they must be "
                "equal. Use the file that was trained for this model."
            )
        is_sharded = hasattr(parameter, "ds_id")
        # rank 0 writes, the engine hands out the shards
        gathered = import_deepspeed().zero.GatheredParameters([parameter], 0) if is_sharded else nullcontext()
        with gathered:
            if parameter.numel() and (not is_sharded or distributed.get_rank() == 0):
                parameter.data.copy_(tensors[name])
