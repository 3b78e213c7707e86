"""llava/train/train.py refuses bad input with exit code 2 and its own message, before a model is loaded."""

from __future__ import annotations

import json
import re
import sys

import pytest

from bad_inputs import DATA, STAGE
from launching import ROOT, Launch
from tiny_training import Tiny

CASES = {**DATA, **STAGE}
ZERO3 = ROOT / "scripts" / "zero3.json"


EXTRA: dict[str, tuple[dict[str, object], str]] = {
    "the model as output": ({"output_dir": "BASE"}, r"is the folder that the model is read from"),
    "a model without config": ({"model_name_or_path": "IMAGES"}, r"holds no config\.json"),
    "a stage of forward passes under ZeRO-2": (
        {"deepspeed": ROOT / "scripts" / "zero2.json"},
        r"has ZeRO stage 2; stage router only runs forward passes",
    ),
    "a zero json that is not there": ({"deepspeed": "none.json"}, r"none\.json"),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
        r"use_reentrant=True cuts the gradient",
    ),
    "skip ratio above its maximum": ({"skip_ratio": 0.7}, r"--target_skip_ratio 0\.7 lies outside"),
    "no calibration": ({"order_samples": 0}, r"--order_samples 0 must be at least 1"),
    "adapters without a router": (
        {"stage": "adapter"},
        r"Stage adapter follows the plans of a calibrated router, but .* has none; run the router stage first",
    ),
    "unknown rule base": ({"rule_base": "sharp"}, r"(?i)rule base.*sharp.*published"),
    "unknown skip pattern": (
        {"skip_pattern": "odd"},
        r"--skip_pattern: invalid choice: 'odd' \(choose from '?plan'?, '?random'?\)",
    ),
    "a skip ratio without skips": (
        {"stage": "dense", "skip_ratio": 0.2},
        r"--target_skip_ratio 0\.2 .* stage dense .* or use one of the stages router, adapter",
    ),
    "calibration of nothing": (
        {"stage": "dense", "order_samples": 8},
        r"--order_samples 8 .* stage dense .*; leave it out, or use one of the stages router",
    ),
    "a rate of adapters that stay": (
        {"roe_lr": 1e-3},
        r"--roe_lr 0\.001 .* stage router \(trains nothing.*; leave it out, or use one of the stages adapter",
    ),
    "a rate of a frozen backbone": ({"backbone_lr": 1e-6}, r"--backbone_lr 1e-06 .* stage router \(trains nothing"),
    "a rank without updates": ({"stage": "dense", "lora_r": 8}, r"--lora_r 8 .* stage dense .* add --lora_enable True"),
    "a rate of a frozen projector": (
        {"stage": "dense", "freeze_mm_mlp_adapter": True, "mm_projector_lr": 1e-5},
        r"--mm_projector_lr 1e-05 .* stage dense \(trains decoder;",
    ),
    "dense shares of drawn skips": (
        {"stage": "adapter", "skip_pattern": "random", "dense_ratio": 0.1},
        r"--dense_ratio 0\.1 .* nothing follows a plan .* leave out --skip_pattern",
    ),
    "bits of no kind": (
        {"stage": "dense", "bits": 5},
        r"--bits: invalid choice: '?5'? \(choose from '?4'?, '?8'?, '?16'?\)",
    ),
    "a form of no kind": (
        {"stage": "dense", "quant_type": "int4"},
        r"--quant_type: invalid choice: 'int4' \(choose from '?nf4'?, '?fp4'?\)",
    ),
    "bits of a decoder that trains whole": (
        {"stage": "dense", "bits": 4},
        r"--bits 4 .* stage dense .* add --lora_enable",
    ),
    "bits of a frozen decoder": (
        {"stage": "adapter", "bits": 8},
        r"--bits 8 .* stage adapter \(trains adapter; .*leave it",
    ),
    "bits under ZeRO-3": (
        {"stage": "dense", "lora_enable": True, "bits": 4, "deepspeed": ZERO3},
        r"--bits 4 was given under ZeRO-3, .* use scripts/zero2\.json",
    ),
    "a form of whole weights": ({"stage": "dense", "quant_type": "fp4"}, r"--quant_type fp4 are about 4-bit weights"),
    "a target that is no ratio": ({"source_skip_ratios": "gqa"}, r"--source_skip_ratios has 'gqa'; SOURCE=RATIO pairs"),
    "a target above the largest ratio": ({"source_skip_ratios": "gqa=0.6"}, r"gqa=0\.6 lies outside \[0, --max_skip"),
    "targets without draws": (
        {"source_skip_ratios": "text=0.2"},
        r"--source_skip_ratios text=0\.2 was given.* stage router",
    ),
    "unknown flag": ({"skip_rate": 0.3}, r"--skip_rate 0\.3 is no flag of training, did you mean --skip_ratio"),
}


@pytest.fixture(scope="module")
def refusals(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, str]]:
    """Exit code and message of every case, from one process."""
    folder = tmp_path_factory.mktemp("refusals")
    words = {"BASE": tiny.base, "IMAGES": tiny.images}
    changes = {name: {key: words.get(str(value), value) for key, value in EXTRA[name][0].items()} for name in EXTRA}
    for name, case in CASES.items():
        (folder / name).mkdir()
        changes[name] = {"deepspeed": ZERO3, **case.changes(tiny, folder / name)}
    lines = {}
    for name, flags in changes.items():
        values = {"stage": "router", "model_name_or_path": tiny.base, "output_dir": folder / name / "output", **flags}
        stage, model, output = (values.pop(key) for key in ("stage", "model_name_or_path", "output_dir"))
        lines[name] = tiny.flags(stage, model, output, **values)
    (folder / "cases.json").write_text(json.dumps(lines))
    launch = Launch([sys.executable, "tests/support/refusal_cases.py", folder / "cases.json", folder / "results.json"])
    code, output = launch.finish(600)
    assert code == 0, output[-4000:]
    assert not list(folder.glob("*/output*"))
    return {name: tuple(result) for name, result in json.loads((folder / "results.json").read_text()).items()}


@pytest.mark.parametrize("name", [*CASES, *EXTRA])
def test_bad_input_is_refused_before_a_model_is_loaded(refusals: dict[str, tuple[object, str]], name: str) -> None:
    code, printed = refusals[name]
    message = CASES[name].message if name in CASES else EXTRA[name][1]
    assert code == 2, (code, printed)
    assert re.search(message, " ".join(printed.split())), printed
    assert name == "unknown flag" or printed.count("error: ") == 1


def test_a_refusal_touches_no_file(tiny: Tiny, refusals: dict[str, tuple[object, str]]) -> None:
    assert sorted(path.name for path in tiny.base.parent.iterdir()) == ["base", "digits", "train.json"]
