"""Memory that a training stage needs per GPU, computed from a configuration before anything is downloaded.

Weights, gradients and optimizer states follow from the number of parameters and their sharding and are exact up to
padding; activations follow from shapes; what CUDA, NCCL and the allocator take is assumed (``RUNTIME_BYTES``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fuzzyroe.attach import attach
from fuzzyroe.routers import LinearRouter
from llava.train.parameters import parameters_by_part
from llava.train.stages import PARTS, Stage, get_stage

GIB = 2**30

SHARDINGS = ("zero2", "zero3", "zero3_offload")
"""DeepSpeed configurations, those of ``scripts/*.json``."""

RUNTIME_BYTES = 2 * GIB
"""Assumed for CUDA context, NCCL buffers and fragmentation."""

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of ``stage3_max_live_parameters``: gathered at once under ZeRO-3."""

LOGIT_BYTES = 12
"""Per logit: bfloat16, its float32 copy for the loss, and the gradients of both."""


def llava_config(size: str) -> LlavaConfig:
    """The architecture of LLaVA-1.5.

    Args:
        size: "7b" or "13b".

    Raises:
        KeyError: If the size is unknown.
    """
    shapes = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}
    if size not in shapes:
        raise KeyError(f"Size '{size}' is unknown; use one of {', '.join(shapes)}, or name a checkpoint.")
    hidden, intermediate, layers, heads = shapes[size]
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


@dataclass(frozen=True)
class Workload:
    """How a stage is to be run.

    Attributes:
        stage: Name in ``STAGES``.
        num_gpus: GPUs over all nodes, at least 1.
        sharding: One of ``SHARDINGS``.
        batch: Samples per GPU and pass, at least 1.
        length: Positions per sample, images expanded, at least 1.
        adapter_width: Width of the skip adapters, at least 1.
        checkpoints_activations: Whether layers are computed again in the backward pass.
        lora_rank: Rank of LoRA on the decoder's linear layers; 0 trains the parts whole.
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
        get_stage(self.stage)
        if self.sharding not in SHARDINGS:
            raise ValueError(f"Sharding {self.sharding} is unknown; use one of {', '.join(SHARDINGS)}.")
        for name in ("num_gpus", "batch", "length", "adapter_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a whole number of at least 1.")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; it is 0 (no LoRA) or more.")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose.

    Attributes:
        per_gpu: Purpose -> bytes on every GPU.
        on_host: Bytes of host memory over all processes of the job.
        parameters: Part -> number of parameters.
        trained: Number of parameters that train.
    """

    per_gpu: dict[str, int]
    on_host: int
    parameters: dict[str, int]
    trained: int

    @property
    def total(self) -> int:
        """Bytes on every GPU."""
        return sum(self.per_gpu.values())


def count_parameters(config: LlavaConfig, adapter_width: int | None, has_linear_router: bool = False) -> dict[str, int]:
    """Count the parameters of each part on a model without storage.

    Args:
        config: Architecture.
        adapter_width: Width of the skip adapters; None counts a model without routing.
        has_linear_router: Whether a linear router with routing tokens is attached too.
    """
    text = config.text_config
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
        if adapter_width is not None:
            router = LinearRouter(text.num_hidden_layers, text.hidden_size) if has_linear_router else None
            attach(model, adapter_width, router=router)
    return {part: sum(p.numel() for p in named.values()) for part, named in parameters_by_part(model).items()}


def estimate_memory(config: LlavaConfig, workload: Workload) -> MemoryEstimate:
    """Estimate what a stage takes.

    Per GPU, with P parameters of which T train, G GPUs: weights 2 P / G (2 P under ZeRO-2), gathered weights
    2 min(P, 1e9) under ZeRO-3, gradients 2 T / G, optimizer 12 T / G (float32 weights and Adam's two moments).
    Offloading moves weights, gradients (there in float32) and optimizer to the host.

    Args:
        config: Architecture.
        workload: Stage, sharding and batch.

    Reference:
        ZeRO (arXiv:1910.02054), section 3, for 2 + 2 + 12 bytes; arXiv:2205.05198, section 4, for activations.
    """
    stage = get_stage(workload.stage)
    width = workload.adapter_width if stage.routing != "off" else None
    parts = count_parameters(config, width, stage.routing == "relaxed")
    total, trained = sum(parts.values()), _trained(config, parts, stage, workload.lora_rank)
    weights, optimizer = 2 * (total + (trained if workload.lora_rank else 0)), 12 * trained
    shards = workload.num_gpus
    per_gpu = {
        "weights": weights // shards,
        "gathered weights": 2 * min(total, MAX_LIVE_PARAMETERS),
        "gradients": 2 * trained // shards,
        "optimizer": optimizer // shards,
        "activations": _activation_bytes(config, workload, is_trained=bool(stage.trains)),
        "runtime (assumed)": RUNTIME_BYTES,
    }
    on_host = 0
    if workload.sharding == "zero2":
        per_gpu |= {"weights": weights, "gathered weights": 0}
    elif workload.sharding == "zero3_offload":
        per_gpu |= {"weights": 0, "gradients": 0, "optimizer": 0}
        on_host = weights + 4 * trained + optimizer
    return MemoryEstimate(per_gpu, on_host, parts, trained)


def what_fits(config: LlavaConfig, workload: Workload, gpu_bytes: int) -> list[Workload]:
    """Give variants of a workload that fit, nearest first: smaller batches, then offloading, then LoRA.

    Args:
        config: Architecture.
        workload: What did not fit.
        gpu_bytes: Memory of one GPU.
    """
    variants, batch = [], workload.batch
    while batch > 1:
        batch //= 2
        variants.append(replace(workload, batch=batch))
    for kept in (workload.batch, 1):
        variants.append(replace(workload, batch=kept, sharding="zero3_offload"))
    if "decoder" in get_stage(workload.stage).trains and not workload.lora_rank:
        variants.append(replace(workload, batch=1, lora_rank=128))
    return [variant for variant in variants if estimate_memory(config, variant).total <= gpu_bytes]


def _trained(config: LlavaConfig, parts: dict[str, int], stage: Stage, lora_rank: int) -> int:
    if not lora_rank or "decoder" not in stage.trains:
        return sum(parts[part] for part in stage.trains)
    text = config.text_config
    kv_size = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    sizes = [  # inputs plus outputs of q, k, v, o, gate, up, down
        2 * text.hidden_size,
        2 * (text.hidden_size + kv_size),
        2 * text.hidden_size,
        3 * (text.hidden_size + text.intermediate_size),
    ]
    lora = lora_rank * text.num_hidden_layers * sum(sizes)
    return lora + sum(parts[part] for part in stage.trains if part in PARTS and part != "decoder")


def _activation_bytes(config: LlavaConfig, workload: Workload, is_trained: bool) -> int:
    """Bytes of bfloat16 activations: what one layer keeps, layer inputs when checkpointing, logits with the loss."""
    text, positions = config.text_config, workload.batch * workload.length
    per_layer = 2 * positions * (10 * text.hidden_size + 4 * text.intermediate_size + 2 * workload.adapter_width)
    logits = positions * text.vocab_size
    if not is_trained:
        return per_layer + 6 * logits
    if workload.checkpoints_activations:
        layers = per_layer + 2 * positions * text.hidden_size * text.num_hidden_layers
    else:
        layers = per_layer * text.num_hidden_layers
    return layers + LOGIT_BYTES * logits
