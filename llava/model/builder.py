"""Loading a LLaVA checkpoint, dense or routed; all that lmms-eval touches."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import cached_file

from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.routers import get_router_class
from fuzzyroe.state_dict import load_routing, load_routing_state_dict
from llava.model.routing import attach_routing, set_budget

ROUTING_FILE = "routing.safetensors"


@dataclass
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: LLaVA, with routing attached if the checkpoint has any.
        tokenizer: Its tokenizer.
        image_processor: Its image processor.
        path: Folder or hub id it came from.
        weights_path: Folder or hub id that the backbone's weights came from.
        routing: The ``fuzzyroe`` block of its configuration; None for a dense checkpoint.
    """

    model: LlavaForConditionalGeneration
    tokenizer: Any
    image_processor: Any
    path: str
    weights_path: str
    routing: FuzzyRoEConfig | None


def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    **kwargs: Any,
) -> Checkpoint:
    """Load model, tokenizer and image processor; what a checkpoint is, is read from its ``config.json`` alone.

    Args:
        path: Folder or hub id.
        dtype: Data type of the weights.
        attn_implementation: "sdpa", "flash_attention_2" or "eager".
        **kwargs: Passed to ``from_pretrained``.

    Raises:
        ValueError: If routing tensors are missing, unexpected or of another shape.
        FileNotFoundError: If the checkpoint's base model is gone.
    """
    path = str(path)
    config = LlavaConfig.from_pretrained(path)
    block = getattr(config, "fuzzyroe", None)
    routing = FuzzyRoEConfig.from_dict(block) if block else None
    weights_path = path if routing is None or routing.base_model is None else _resolve_base(path, routing.base_model)
    model = LlavaForConditionalGeneration.from_pretrained(
        weights_path, config=config, dtype=dtype, attn_implementation=attn_implementation, **kwargs
    )
    # Under ZeRO-3 a model keeps key conversions and would reverse them on saving, into names that others cannot read.
    model.__dict__.pop("_weight_conversions", None)
    if routing is not None:
        _load_routing(model, path, routing)
    tokenizer = AutoTokenizer.from_pretrained(path)
    processor = CLIPImageProcessorPil.from_pretrained(path)
    return Checkpoint(model, tokenizer, processor, path, weights_path, routing)


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    skip_rate: float | None = None,
    torch_dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    multimodal: bool = True,
) -> tuple[Any, LlavaForConditionalGeneration, Any, int]:
    """LLaVA's loader: same arguments, same return order.

    Args:
        model_path: Checkpoint folder or hub id.
        model_base: Not needed: a checkpoint names its base itself.
        model_name: Not needed: nothing is decided by a name.
        load_8bit, load_4bit: Not supported here.
        device_map: As for ``from_pretrained``; ignored where ``device`` is "cpu".
        device: "cpu" or a CUDA device.
        skip_rate: Mean skip rate to route with; None keeps the checkpoint's own.
        torch_dtype: Data type; None takes float32 on a CPU and float16 elsewhere, as LLaVA does.
        attn_implementation: "sdpa", "flash_attention_2" or "eager".
        multimodal: Accepted for lmms-eval; a LLaVA model always is.

    Returns:
        Tokenizer, model, image processor, context length in tokens.

    Raises:
        ValueError: If an unsupported option is asked for.
    """
    if load_8bit or load_4bit:
        raise ValueError("load_8bit and load_4bit are not supported; load in float16 or bfloat16 instead.")
    if model_base is not None:
        raise ValueError(f"model_base {model_base} is not needed: a checkpoint names its base; leave it out.")
    on_cpu = str(device) == "cpu" or not torch.cuda.is_available()
    dtype = torch_dtype or (torch.float32 if on_cpu else torch.float16)
    placement = {} if on_cpu else {"device_map": device_map}
    checkpoint = load_checkpoint(model_path, dtype, attn_implementation, **placement)
    model = checkpoint.model.eval()
    if skip_rate is not None:
        set_budget(model, skip_rate)
    return checkpoint.tokenizer, model, checkpoint.image_processor, model.config.text_config.max_position_embeddings


def _load_routing(model: LlavaForConditionalGeneration, path: str, routing: FuzzyRoEConfig) -> None:
    text_config = model.config.text_config
    router = get_router_class(routing.router).from_checkpoint(
        routing.router_options,
        text_config.num_hidden_layers,
        text_config.hidden_size,
        functools.partial(cached_file, path),
    )
    attach_routing(model, router, routing.adapter_width, skip_unit=routing.skip_unit)
    load_routing_state_dict(model, load_routing(cached_file(path, ROUTING_FILE)))


def _resolve_base(path: str, base_model: str) -> str:
    """A base named by a relative path lies relative to the checkpoint that names it."""
    beside = Path(path) / base_model
    if beside.is_dir():
        return str(beside.resolve())
    if base_model.startswith((".", "/")):
        raise FileNotFoundError(
            f"{path} holds no backbone weights and its base model is not at {beside}; put the base model there, or "
            "correct fuzzyroe.base_model in config.json."
        )
    return base_model
