"""Promises of loading under ZeRO-3: sharded over two ranks, a model of any layout has the weights of one process."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launching import ROOT, Launch
from layouts import build_parts, write_hub, write_original, write_original_lora, write_projector_only
from llava.train.arguments import ModelArguments
from llava.train.load_model import load_model

pytestmark = pytest.mark.slow


def test_every_layout_is_loaded_onto_two_ranks_as_onto_one(tmp_path: Path) -> None:
    parts = build_parts(tmp_path)
    write_hub(parts, tmp_path / "hub")
    write_original(parts, tmp_path / "foo", "llava", "bin", 2, False)
    write_original_lora(parts, tmp_path / "lora")
    write_projector_only(parts, tmp_path / "pretrain")
    vision = {"vision_tower": str(parts.tower), "pretrain_mm_mlp_adapter": str(tmp_path / "pretrain/mm_projector.bin")}
    cases = [
        {"name": "hub", "model_name_or_path": str(tmp_path / "hub")},
        {"name": "foo", "model_name_or_path": str(tmp_path / "foo")},
        {"name": "lora", "model_name_or_path": str(tmp_path / "lora")},
        {"name": "composed", "model_name_or_path": str(parts.vicuna), **vision},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = ROOT / "tests" / "support" / "zero3_loading.py"
    words = ["--num_gpus", "2", "--master_port", str(port), program, tmp_path, tmp_path / "cases.json"]
    code, output = Launch([Path(sys.executable).parent / "deepspeed", *words]).finish(600)
    assert code == 0, output[-6000:]
    for case in cases:
        name = case.pop("name")
        alone = load_model(ModelArguments(**case), torch.float32, seed=0).model.state_dict()
        sharded = load_file(tmp_path / f"{name}.safetensors")
        wrong = [key for key, tensor in sharded.items() if not torch.equal(tensor, alone[key])]
        assert sharded.keys() == alone.keys() and not wrong, (name, wrong)
