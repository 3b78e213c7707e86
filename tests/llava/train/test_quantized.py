"""Promises of QLoRA's flags; training on quantized weights itself needs bitsandbytes, which the suite does not have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava.train.arguments import LlavaTrainingArguments, parse_arguments
from llava.train.checkpointing import describe_run
from llava.train.checks import check_inputs
from llava.train.parameters import prepare_quantized, quantization_options
from tiny_training import Tiny


def test_sixteen_bits_load_a_model_as_ever(tmp_path: Path) -> None:
    assert quantization_options(LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True), torch.float32) == {}


def test_llavas_flags_are_taken(tiny: Tiny, tmp_path: Path) -> None:
    more = {"lora_enable": True, "bits": 4, "double_quant": False, "quant_type": "fp4"}
    arguments = parse_arguments(tiny.flags("dense", tiny.base, tmp_path / "output", **more))
    found = arguments[-1]
    assert (found.bits, found.double_quant, found.quant_type) == (4, False, "fp4")
    described = describe_run(arguments)
    assert (described["bits"], described["double_quant"], described["quant_type"]) == (4, False, "fp4")


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_without_bitsandbytes_are_refused_before_anything_is_loaded(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    flags = tiny.flags("dense", tiny.base, tmp_path / "output", lora_enable=True, bits=bits, skip_data_check=True)
    with pytest.raises(ImportError, match=f"--bits {bits} was given but bitsandbytes is not installed; pip install"):
        check_inputs(parse_arguments(flags))


def test_what_is_not_quantized_is_frozen_in_float32_and_saved_without_a_word_of_quantization(
    tiny_llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    model = tiny_llava.to(torch.bfloat16)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    prepare_quantized(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.config.save_pretrained(tmp_path)
    assert "quantization" not in (tmp_path / "config.json").read_text()
