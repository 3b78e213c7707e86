"""QLoRA: the decoder's linear layers quantized while they are loaded, with LoRA weights trained on top of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava.model.builder import describe_quantization
from llava.train.arguments import FULL_BITS, LlavaTrainingArguments
from llava.train.lora import import_peft


def loading_options(training_args: LlavaTrainingArguments, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` needs to quantize while it loads; nothing with 16 bits.

    Args:
        training_args: ``bits``, ``double_quant`` and ``quant_type`` are read, and the device.
        dtype: Data type that is computed in.
    """
    bits = training_args.bits
    if bits == FULL_BITS:
        return {}
    config = describe_quantization(load_8bit=bits == 8, load_4bit=bits == 4, dtype=dtype)
    config.bnb_4bit_use_double_quant = training_args.double_quant
    config.bnb_4bit_quant_type = training_args.quant_type
    return {"quantization_config": config, "device_map": {"": training_args.device}}


def prepare_quantized(model: nn.Module) -> None:
    """Make a quantized model ready for updates: what is not quantized is cast to float32; call before ``add_lora``.

    What is saved names the whole base, so the saved configuration must not speak of quantization.

    Reference:
        QLoRA (arXiv:2305.14314).
    """
    import_peft().prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    del model.config.quantization_config
    model._hf_peft_config_loaded = True  # else transformers' trainer refuses the model as one without updates
