"""QLoRA: the decoder's linear maps quantized while they are loaded, with low-rank updates trained on top of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from llava.model.builder import describe_quantization
from llava.train.arguments import FULL_BITS, LlavaTrainingArguments
from llava.train.lora import import_peft
from llava.train.stages import STAGES, Stage, StageInputError


def check_quantized(stage: Stage, training_args: LlavaTrainingArguments) -> None:
    """Refuse ``--bits``, ``--double_quant`` and ``--quant_type`` where they cannot act.

    Raises:
        StageInputError: If the stage trains no low-rank updates, or ZeRO-3 would partition quantized weights.
        ImportError: If bitsandbytes is not installed.
    """
    bits = training_args.bits
    if bits != 4 and (not training_args.double_quant or training_args.quant_type != "nf4"):
        raise StageInputError(
            f"--double_quant {training_args.double_quant} and --quant_type {training_args.quant_type} are about 4-bit "
            f"weights, --bits is {bits}; leave them out, or give --bits 4."
        )
    if bits == FULL_BITS:
        return
    if "lora" not in stage.trains:
        trains_decoder = "decoder" in STAGES[stage.name].trains
        remedy = "add --lora_enable True" if trains_decoder else "leave it out"
        reason = "trains it whole" if trains_decoder else "does not train it"
        raise StageInputError(
            f"--bits {bits} trains low-rank updates on a quantized decoder, stage {stage.name} {reason}; {remedy}."
        )
    if training_args.deepspeed and training_args.hf_deepspeed_config.is_zero3():
        raise StageInputError(
            f"--bits {bits} was given under ZeRO-3, which cannot partition quantized weights; use scripts/zero2.json, "
            "or leave --bits out."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"--bits {bits} was given but bitsandbytes is not installed; pip install bitsandbytes, or leave --bits out."
        )


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
