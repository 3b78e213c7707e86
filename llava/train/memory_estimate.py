"""Memory that a training stage needs per GPU, computed from a configuration before anything is downloaded.

Weights, gradients and optimizer states follow from the number of parameters and their sharding and are exact up to
padding; activations follow from shapes; what CUDA, NCCL and the allocator take is assumed (``RUNTIME_BYTES``).
DeepSpeed's own estimators take every parameter for trained, which no stage but ``scratch`` does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fuzzyroe.attach import attach, find_decoder_layers
from fuzzyroe.routers import get_router_class
from llava.model.families import HostModel
from llava.train.parameters import parameters_by_part
from llava.train.stages import choose_stage, get_stage

GIB = 2**30

SHARDINGS = ("zero2", "zero3", "zero3_offload")
"""DeepSpeed configurations, those of ``scripts/*.json``."""

RUNTIME_BYTES, MAX_LIVE_PARAMETERS, LOGIT_BYTES = 2 * GIB, 1_000_000_000, 12
"""Assumed for CUDA context, NCCL buffers and fragmentation; gathered at once under ZeRO-3, DeepSpeed's default of
``stage3_max_live_parameters``; per logit: bfloat16, its float32 copy for the loss, and the gradients of both."""


@dataclass(frozen=True)
class Workload:
    """How a stage, a name in ``STAGES``, is to be run, on ``num_gpus`` over all nodes.

    ``batch`` counts samples per GPU and pass, ``length`` positions per sample with images expanded; layers that are
    checkpointed are computed again in the backward pass; a ``lora_rank`` of 0 trains the decoder whole.
    """

    stage: str
    num_gpus: int
    sharding: str = "zero3"
    batch: int = 4
    length: int = 2048
    adapter_width: int = 1024
    checkpoints_activations: bool = True
    lora_rank: int = 0

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise ValueError(f"Sharding {self.sharding} is unknown; use one of {', '.join(SHARDINGS)}.")
        for name, lowest in (("num_gpus", 1), ("batch", 1), ("length", 1), ("adapter_width", 1), ("lora_rank", 0)):
            value = getattr(self, name)
            if value < lowest:
                raise ValueError(f"{name} is {value}; it is a whole number of at least {lowest}.")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose on every GPU, and on the host over all processes; parameters by part, and how many train."""

    per_gpu: dict[str, int]
    on_host: int
    parameters: dict[str, int]
    trained: int

    @property
    def total(self) -> int:
        """Bytes on every GPU."""
        return sum(self.per_gpu.values())


def count_parameters(
    config: Any, adapter_width: int | None, has_linear_router: bool = False, lora_rank: int = 0
) -> dict[str, int]:
    """Count the parameters of each part on a model without storage.

    An ``adapter_width`` of None counts a model without routing; LoRA lies on all linear layers of the decoder.
    """
    with torch.device("meta"):
        model = HostModel(config)
        # counted before routing is attached, so that adapters, which are linear layers too, get no LoRA
        linear = [module for module in find_decoder_layers(model).modules() if isinstance(module, nn.Linear)]
        if adapter_width is not None:
            sizes = config.text_config.num_hidden_layers, config.text_config.hidden_size
            router = get_router_class("linear").build({}, *sizes) if has_linear_router else None
            attach(model, adapter_width, router=router)
    parts = {part: sum(p.numel() for p in named.values()) for part, named in parameters_by_part(model).items()}
    return parts | {"lora": lora_rank * sum(module.in_features + module.out_features for module in linear)}


def estimate_memory(config: Any, workload: Workload) -> MemoryEstimate:
    """Estimate what a stage takes.

    Per GPU, with P parameters of which T train, G GPUs: weights 2 P / G (2 P under ZeRO-2), gathered weights
    2 min(P, 1e9) under ZeRO-3, gradients 2 T / G, optimizer 12 T / G (float32 weights and Adam's two moments).
    Offloading moves weights, gradients (there in float32) and optimizer to the host.

    Reference:
        ZeRO (arXiv:1910.02054), section 3, for 2 + 2 + 12 bytes; arXiv:2205.05198, section 4, for activations.
    """
    # with LoRA the decoder stays, and its LoRA weights train
    stage = choose_stage(workload.stage, lora=workload.lora_rank > 0)
    width = workload.adapter_width if stage.routing != "off" else None
    parts = count_parameters(config, width, stage.routing == "relaxed", workload.lora_rank)
    total, trained = sum(parts.values()), sum(parts[part] for part in stage.trains)
    per_gpu = {
        "weights": 2 * total // workload.num_gpus,
        "gathered weights": 2 * min(total, MAX_LIVE_PARAMETERS),
        "gradients": 2 * trained // workload.num_gpus,
        "optimizer": 12 * trained // workload.num_gpus,
        "activations": _activation_bytes(config, workload, is_trained=bool(stage.trains)),
        "runtime (assumed)": RUNTIME_BYTES,
    }
    on_host = 0
    # ZeRO-2 shards gradients and optimizer alone; offloading keeps float32 copies of gradients on the host
    if workload.sharding == "zero2":
        per_gpu |= {"weights": 2 * total, "gathered weights": 0}
    elif workload.sharding == "zero3_offload":
        per_gpu |= {"weights": 0, "gradients": 0, "optimizer": 0}
        on_host = 2 * total + (4 + 12) * trained
    return MemoryEstimate(per_gpu, on_host, parts, trained)


def what_fits(config: Any, workload: Workload, gpu_bytes: int) -> list[Workload]:
    """Give variants of a workload that fit into the memory of one GPU, nearest to what was asked first."""
    # batches only cost time, offloading costs more, LoRA trains something else
    batches = [workload.batch >> shift for shift in range(1, workload.batch.bit_length())]
    variants = [replace(workload, batch=batch) for batch in batches]
    variants += [replace(workload, batch=batch, sharding="zero3_offload") for batch in (workload.batch, 1)]
    if "decoder" in get_stage(workload.stage).trains and not workload.lora_rank:
        variants.append(replace(workload, batch=1, lora_rank=128))
    return [variant for variant in variants if estimate_memory(config, variant).total <= gpu_bytes]


def _activation_bytes(config: Any, workload: Workload, is_trained: bool) -> int:
    """Bytes of bfloat16 activations: what one layer keeps, layer inputs when checkpointing, logits with the loss."""
    text, positions = config.text_config, workload.batch * workload.length
    per_layer = 2 * positions * (10 * text.hidden_size + 4 * text.intermediate_size + 2 * workload.adapter_width)
    logits = LOGIT_BYTES * positions * text.vocab_size
    # one layer at a time is alive in a forward pass, and in a backward pass that computes layers again
    if not is_trained:
        return per_layer + logits // 2  # without gradients half of them
    if workload.checkpoints_activations:
        return per_layer + 2 * positions * text.hidden_size * text.num_hidden_layers + logits
    return per_layer * text.num_hidden_layers + logits
