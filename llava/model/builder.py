"""Loading of a checkpoint, dense or routed; the part of the contract with lmms-eval that touches models."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fuzzyroe import set_skip_rate
from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.state_dict import load_routing_state_dict
from llava.model.checkpoints.contents import CheckpointContents
from llava.model.checkpoints.reading import read_checkpoint
from llava.model.families import HostModel
from llava.model.llava_llama import LlavaLlamaForCausalLM, attach_routing
from llava.model.token_pruning import has_token_pruning, set_token_pruning

WHOLE_MODULES = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""Parts that stay in the data type of the model where the others are quantized."""


@dataclass
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: LLaVA, with routing attached if the checkpoint has any.
        tokenizer, image_processor: Its tokenizer and image processor.
        path, weights_path: Folder or hub id that it came from, and that the backbone's weights came from.
        routing: The ``fuzzyroe`` block of its configuration; None for a dense checkpoint.
    """

    model: HostModel
    tokenizer: Any
    image_processor: Any
    path: str
    weights_path: str
    routing: FuzzyRoEConfig | None


def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str = "sdpa",
    model_base: str | None = None,
    **kwargs: Any,
) -> Checkpoint:
    """Load model, tokenizer and image processor; what a checkpoint is, is read from its files alone.

    Args:
        path: Folder or hub id of a LLaVA-1.5 in transformers' or the original layout, or of a projector, LoRA
            weights or routing that belong to one.
        dtype: Data type of the weights.
        attn_implementation: "sdpa", "flash_attention_2" or "eager".
        model_base: Folder or hub id of what a projector or LoRA weights belong to, instead of what they name.
        **kwargs: Passed to ``from_pretrained``.

    Raises:
        ValueError: If it is another kind of model, or tensors are missing, unexpected or of another shape.
        FileNotFoundError: If files are missing, or the checkpoint's base model is gone.
    """
    return build_checkpoint(read_checkpoint(path, model_base), path, dtype, attn_implementation, **kwargs)


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
    visual_tokens: int | None = None,
) -> tuple[Any, HostModel, Any, int]:
    """LLaVA's loader: same arguments, same return order.

    Args:
        model_path: Checkpoint folder or hub id.
        model_base: What a projector or LoRA weights belong to; None for what they name, and for whole models.
        model_name: Not needed: nothing is decided by a name.
        load_8bit, load_4bit: Quantize the decoder's linear layers with bitsandbytes while loading.
        device_map: As for ``from_pretrained``; used where ``device`` is "cuda", which names no single one.
        device: "cpu"; "cuda"; or one device, such as "cuda:1", for the whole model. Without CUDA it is the CPU.
        skip_rate: Mean skip rate to route with; None keeps the checkpoint's own.
        torch_dtype: Data type; None takes float32 on a CPU and float16 elsewhere, as LLaVA does.
        attn_implementation: "sdpa", "flash_attention_2" or "eager".
        multimodal: Accepted for lmms-eval; a LLaVA model always is.
        visual_tokens: Tokens that the decoder reads of each image, the most important ones; None keeps what the
            checkpoint says, which is all unless it was pruned; ``count_image_tokens(model.config)`` tells.

    Returns:
        Tokenizer, model, image processor, context length in tokens.

    Raises:
        ImportError: If quantization is asked for, and bitsandbytes is not installed.
        ValueError: As ``load_checkpoint``; if a skip rate is asked of a dense checkpoint, or more visual
            tokens than there are.

    >>> tokenizer, model, image_processor, length = load_pretrained_model("llava-hf/llava-1.5-7b-hf")  # doctest: +SKIP
    """
    on_cpu = torch.device(device).type == "cpu" or not torch.cuda.is_available()
    dtype = torch_dtype or (torch.float32 if on_cpu else torch.float16)
    options: dict[str, Any] = {}
    if not on_cpu:
        # as in LLaVA: a device other than plain "cuda" takes the whole model, whatever the map says
        options["device_map"] = device_map if str(device) == "cuda" else {"": str(device)}
    if load_8bit or load_4bit:
        options["quantization_config"] = describe_quantization(load_8bit, load_4bit, dtype)
    checkpoint = load_checkpoint(model_path, dtype, attn_implementation, model_base, **options)
    model = checkpoint.model.eval()  # routing in training mode asks for soft decisions
    if skip_rate is not None:
        set_skip_rate(model, skip_rate)
    if visual_tokens is not None:
        set_token_pruning(model, visual_tokens)
    return checkpoint.tokenizer, model, checkpoint.image_processor, model.config.text_config.max_position_embeddings


def build_checkpoint(
    contents: CheckpointContents, path: str | Path, dtype: torch.dtype | str, attn_implementation: str, **kwargs: Any
) -> Checkpoint:
    """Make a model of what was read from a path, with options of ``load_checkpoint``; call on all ranks.

    Weights that are not there are drawn.
    """
    model = HostModel.from_pretrained(
        None,
        config=contents.config,
        state_dict={name: contents.tensor(name) for name in contents.weights},
        generation_config=contents.generation_config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        **kwargs,
    )
    # Key conversions of loading would be reversed on saving, into names that others cannot read.
    model.__dict__.pop("_weight_conversions", None)
    model.config.name_or_path = contents.path
    model = LlavaLlamaForCausalLM.adopt(model, contents.image_processor)
    # after the backbone: routing keeps its own data types, and its names do not depend on what is around the decoder
    routing = contents.routing
    if routing is not None:
        router = routing.build_router(model.config.text_config)
        attach_routing(model, router, routing.config.adapter_width, skip_unit=routing.config.skip_unit)
        load_routing_state_dict(model, routing.tensors)
    if has_token_pruning(model):  # set once more, to refuse what this model cannot do
        settings: Any = model.config
        set_token_pruning(model, settings.num_visual_tokens, getattr(settings, "token_pruner", "dominant_merged"))
    config = None if routing is None else routing.config
    return Checkpoint(model, contents.tokenizer, contents.image_processor, str(path), contents.path, config)


def describe_quantization(load_8bit: bool, load_4bit: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Describe to bitsandbytes how linear layers are quantized while they are loaded, to compute in ``dtype``.

    Raises:
        ImportError: If bitsandbytes is not installed.
        ValueError: If both are asked for.

    Reference:
        LLM.int8() (arXiv:2208.07339), QLoRA (arXiv:2305.14314).
    """
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit were both given; a weight has one form. Give one of them.")
    if importlib.util.find_spec("bitsandbytes") is None:
        name = "load_8bit" if load_8bit else "load_4bit"
        raise ImportError(
            f"{name} was given but bitsandbytes is not installed; pip install bitsandbytes, or load in half precision."
        )
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=load_4bit,
        llm_int8_skip_modules=WHOLE_MODULES,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )
