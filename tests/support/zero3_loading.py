"""Loads models as a stage does, sharded under ZeRO-3, and writes down their whole weights.

    deepspeed --num_gpus 2 tests/support/zero3_loading.py OUTPUT CASES.json

The cases are flags of ``ModelArguments``, each with a ``name``; rank 0 writes ``OUTPUT/NAME.safetensors``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llava.train.arguments import LlavaTrainingArguments, ModelArguments
from llava.train.load_model import load_model
from llava.train.zero3 import init_communication
from zero3_cases import gather_all


def main() -> None:
    """Load every case."""
    words = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    output, cases = Path(words[0]), json.loads(Path(words[1]).read_text())
    zero3 = str(Path(__file__).resolve().parents[2] / "scripts" / "zero3.json")
    arguments = LlavaTrainingArguments(output_dir=str(output / "unused"), use_cpu=True, deepspeed=zero3)
    init_communication()
    for case in cases:
        name = case.pop("name")
        model = load_model(ModelArguments(**case), torch.float32, seed=0).model
        sharded = [hasattr(parameter, "ds_id") for name, parameter in model.named_parameters() if "adapter" not in name]
        assert all(sharded) and distributed.get_world_size() == 2 and arguments.deepspeed
        tensors = gather_all(model)
        if distributed.get_rank() == 0:
            save_file(tensors, output / f"{name}.safetensors")


if __name__ == "__main__":
    main()
