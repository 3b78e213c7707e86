"""Training on two ranks under DeepSpeed ZeRO-3: stages and hard skipping, from two launches."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import zero3_cases
from fuzzyroe import set_skip_rate
from launching import ROOT, Launch
from llava.conversation import get_template
from llava.inference.generator import GenerationOptions, Generator, make_message
from llava.model.builder import load_checkpoint
from llava.train.arguments import takes
from llava.train.stages import PARTS, get_stage
from tiny_training import Tiny

ZERO3 = ROOT / "scripts" / "zero3.json"
STAGES = ("router", "adapter", "finetune", "forced", "hard", "hard_frozen", "layer_regression")

GRADIENT = {"optim": "sgd", "roe_lr": 1.0, "backbone_lr": 1.0, "max_steps": 1, "max_grad_norm": 0}
"""Flags under which a run's only step subtracts the gradient from the weights."""

HARD = {
    "hard": ("finetune", {"per_device_train_batch_size": 2}),
    "hard_frozen": ("adapter", {"per_device_train_batch_size": 1, "gradient_checkpointing": True}),
}
"""Case -> stage and flags of training that leaves layers out; the second has a frozen backbone and, in the order of the
file, a text-only sample on one rank beside an image on the other."""


def gradient_flags(stage: str) -> dict[str, object]:
    """Those of ``GRADIENT`` that act in a stage."""
    return {flag: value for flag, value in GRADIENT.items() if takes(get_stage(stage), flag)}


def launch_two_ranks(program: Path, *arguments: object) -> Launch:
    """Start a program on two CPU ranks at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    words = [str(argument) for argument in arguments]
    return Launch([deepspeed, "--num_gpus", "2", "--master_port", str(port), program, *words])


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outputs of four stages, all from one launch."""
    folder = tmp_path_factory.mktemp("zero3")
    cases = [
        {"name": "router", "flags": tiny.flags("router", tiny.base, folder / "router", deepspeed=ZERO3)},
        {
            "name": "adapter",
            "flags": tiny.flags("adapter", folder / "router", folder / "adapter", deepspeed=ZERO3),
            "in_order": True,
        },
        {
            "name": "finetune",
            "flags": tiny.flags("finetune", folder / "adapter", folder / "finetune", deepspeed=ZERO3),
            "in_order": True,
        },
        {
            "name": "forced",
            "flags": tiny.flags(
                "finetune", folder / "adapter", folder / "forced", deepspeed=ZERO3, per_device_train_batch_size=2
            ),
            "forced_plans": True,
        },
    ]
    for name, (stage, more) in HARD.items():
        more = {"deepspeed": ZERO3, "train_hard_skip": True, **gradient_flags(stage), **more}
        flags = tiny.flags(stage, folder / "adapter", folder / name, **more)
        cases.append({"name": name, "flags": flags, "forced_plans": True, "in_order": True})
    more = {"deepspeed": ZERO3, "objective": "layer_regression", **gradient_flags("adapter")}
    flags = tiny.flags("adapter", folder / "router", folder / "layer_regression", per_device_train_batch_size=2, **more)
    cases.append({"name": "layer_regression", "flags": flags})
    (folder / "plan.json").write_text(json.dumps(cases))
    code, output = launch_two_ranks(ROOT / "tests" / "support" / "zero3_cases.py", folder / "plan.json").finish(900)
    assert code == 0, output[-6000:]
    return folder


def read_summary(folder: Path) -> dict:
    """What a stage says about itself."""
    return json.loads((folder / "stage.json").read_text())


def read_seen(trained: Path, name: str, key: str) -> list[list]:
    """What each rank saw in a case."""
    return [json.loads((trained / f"{name}.rank{rank}.json").read_text())[key] for rank in range(2)]


def read_losses(folder: Path) -> list[float]:
    """Losses of the steps of a stage."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def load_base(tiny: Tiny) -> dict[str, Tensor]:
    """Weights of the base model under the names that stock transformers gives its parameters."""
    return dict(LlavaForConditionalGeneration.from_pretrained(tiny.base).named_parameters())


@pytest.mark.parametrize("name", STAGES)
def test_every_case_ran_on_a_zero3_engine_of_two_ranks(trained: Path, name: str) -> None:
    summary = read_summary(trained / name)
    assert (summary["engine"], summary["zero_stage"], summary["world_size"]) == ("DeepSpeedEngine", 3, 2)
    assert not list(trained.glob("*.partial")) and not list(trained.glob("*.old"))


def test_a_router_calibrated_on_two_ranks_is_the_one_of_a_single_process(
    tiny: Tiny, trained: Path, tmp_path: Path
) -> None:
    zero3_cases.run_case("router", tiny.flags("router", tiny.base, tmp_path / "router"))
    zero3_cases.reset()
    alone, both = (read_summary(folder / "router") for folder in (tmp_path, trained))
    assert alone["zero_stage"] == 0 and alone["world_size"] == 1
    for key in ("layer_order", "thresholds", "flipped_features", "examples", "score_examples", "samples", "passes"):
        assert both["calibration"][key] == alone["calibration"][key], key
    for ours, theirs in zip(both["calibration"]["rules"], alone["calibration"]["rules"], strict=True):
        assert ours == {
            key: pytest.approx(value, abs=1e-4) if isinstance(value, float) else value for key, value in theirs.items()
        }
    tensors = [load_file(folder / "router" / "routing.safetensors") for folder in (trained, tmp_path)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], atol=1e-4, rtol=0, msg=name)


def test_the_router_stage_trains_nothing(tiny: Tiny, trained: Path) -> None:
    gathered = load_file(trained / "router.gathered.safetensors")
    for name, tensor in load_base(tiny).items():
        assert torch.equal(gathered[name], tensor), name
    assert "steps" not in read_summary(trained / "router")


def test_the_adapter_stage_moves_adapters_and_nothing_else(tiny: Tiny, trained: Path) -> None:
    gathered = load_file(trained / "adapter.gathered.safetensors")
    base = load_base(tiny)
    assert {name for name in gathered if ".adapter." not in name} == set(base)
    for name, tensor in base.items():
        assert torch.equal(gathered[name], tensor), name
    before, after = (load_file(trained / name / "routing.safetensors") for name in ("router", "adapter"))
    assert any(not torch.equal(before[name], after[name]) for name in before if "adapter" in name)
    assert read_summary(trained / "adapter")["moved"] == {part: part == "adapter" for part in PARTS}


def test_the_finetune_stage_moves_all_but_the_vision_tower(tiny: Tiny, trained: Path) -> None:
    gathered, base = load_file(trained / "finetune.gathered.safetensors"), load_base(tiny)
    for name, tensor in base.items():
        is_tower = name.startswith("model.vision_tower.")
        assert torch.equal(gathered[name], tensor) == is_tower or torch.count_nonzero(tensor) == 0, name
    moved = ("projector", "decoder", "adapter")
    assert read_summary(trained / "finetune")["moved"] == {part: part in moved for part in PARTS}


@pytest.mark.parametrize("name", ["adapter", "finetune"])
def test_a_text_only_batch_on_one_rank_trains_beside_images_on_the_other(trained: Path, name: str) -> None:
    assert read_seen(trained, name, "has_images") == [[False] * 3, [True] * 3]
    assert read_summary(trained / name)["steps"] == 3


@pytest.mark.parametrize("name", STAGES)
def test_every_output_loads_and_answers_at_every_budget(trained: Path, name: str) -> None:
    checkpoint = load_checkpoint(trained / name)
    checkpoint.model.eval()
    generator = Generator(checkpoint, get_template("digits"))
    messages = [make_message("Which digit?", [Image.new("RGB", (32, 32))]), make_message("Two plus two?", [])]
    for skip_rate in (None, 0.0, 0.25, 0.5):
        set_skip_rate(checkpoint.model, skip_rate)
        batch = generator.generate(messages, GenerationOptions(max_new_tokens=3))
        assert len(batch.texts) == 2 and (skip_rate or batch.kept_layers.all())
    saved = load_file(trained / f"{name}.gathered.safetensors")
    for parameter_name, parameter in checkpoint.model.named_parameters():
        assert torch.equal(parameter, saved[parameter_name]), parameter_name


@pytest.mark.parametrize("name", ["finetune", "forced"])
def test_stock_transformers_loads_what_finetuning_wrote(trained: Path, name: str) -> None:
    model, info = LlavaForConditionalGeneration.from_pretrained(trained / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    saved = load_file(trained / f"{name}.gathered.safetensors")
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[parameter_name]), parameter_name


def test_disagreeing_plans_on_two_ranks_train_as_one_process_does(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    plans = read_seen(trained, "forced", "plans")
    assert all(one != other for one, other in zip(*plans, strict=True))
    flags = tiny.flags("finetune", trained / "adapter", tmp_path / "forced", per_device_train_batch_size=4)
    zero3_cases.run_case("forced", flags, forced_plans=True)
    zero3_cases.reset()
    assert read_losses(trained / "forced") == pytest.approx(read_losses(tmp_path / "forced"), abs=1e-5)
    both, alone = (load_file(folder / "forced.gathered.safetensors") for folder in (trained, tmp_path))
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("name", HARD)
def test_ranks_that_leave_out_different_layers_find_the_gradients_of_one_process(
    tiny: Tiny, trained: Path, tmp_path: Path, name: str
) -> None:
    stage, more = HARD[name]
    num_rows = more["per_device_train_batch_size"]
    plans, rows_run = (read_seen(trained, name, key) for key in ("plans", "rows_run"))
    assert all(one != other for one, other in zip(*plans, strict=True)), "ranks disagree"
    assert all(min(rows) < num_rows for rank in rows_run for rows in rank), "rows were left out"
    if name == "hard_frozen":
        assert read_seen(trained, name, "has_images") == [[False], [True]]
    more = {**more, **gradient_flags(stage), "train_hard_skip": True, "per_device_train_batch_size": 2 * num_rows}
    flags = tiny.flags(stage, trained / "adapter", tmp_path / name, **more)
    zero3_cases.run_case(name, flags, forced_plans=True, in_order=True)
    zero3_cases.reset()
    assert read_losses(trained / name) == pytest.approx(read_losses(tmp_path / name), abs=1e-5)
    both, alone = (load_file(folder / f"{name}.gathered.safetensors") for folder in (trained, tmp_path))
    start = load_file(trained / "adapter.gathered.safetensors")
    for parameter_name, tensor in both.items():
        torch.testing.assert_close(tensor, alone[parameter_name], atol=1e-5, rtol=0, msg=parameter_name)
    changed = {key for key, tensor in both.items() if not torch.equal(tensor, start[key])}
    assert changed and (stage == "finetune" or all(".adapter." in key for key in changed))


def test_layer_regression_trains_adapters_alone(trained: Path) -> None:
    before, after = (load_file(trained / f"{name}.gathered.safetensors") for name in ("router", "layer_regression"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.language_model.layers.{layer}.adapter.up.weight" for layer in range(4)}
    assert read_losses(trained / "layer_regression") == [pytest.approx(1.0)]


@pytest.mark.parametrize(("name", "rates"), [
    ("adapter", {"adapter": 1e-2}),
    ("finetune", {"projector": 1e-3, "decoder": 1e-3, "adapter": 1e-2}),
    ("layer_regression", {"adapter": 1.0}),
])  # fmt: skip
def test_both_ranks_step_the_same_optimizer_groups_with_each_trained_parameter_in_one(
    trained: Path, name: str, rates: dict[str, float]
) -> None:
    groups, others = read_seen(trained, name, "groups")
    names, other_names = read_seen(trained, name, "trained")
    assert groups == others and names == other_names
    held = [(parameter, size) for group in groups for parameter, sizes in group["params"].items() for size in sizes]
    saved = load_file(trained / f"{name}.gathered.safetensors")
    assert sorted(held) == sorted((parameter, saved[parameter].numel()) for parameter in names)
    assert {group["name"].split("/")[0]: group["lr"] for group in groups} == rates
    assert len({group["name"] for group in groups}) == len(groups)
    assert all(group["params"] for group in groups)


def test_metrics_join_what_both_ranks_saw(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "adapter" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:  # rank 0 has text only, rank 1 images
        by_source = [line[name] for name in line if name.startswith("routing/skip_rate/source_")]
        assert "routing/skip_rate/source_text" in line and len(by_source) == 2
        assert line["routing/skip_rate"] == pytest.approx(sum(by_source) / 2)
        layers = [line[f"routing/skip_rate/layer_{layer:02d}"] for layer in range(4)]
        assert line["routing/skip_rate"] == pytest.approx(sum(layers) / 4)
        assert sum(line[name] for name in line if name.startswith("routing/fuzzy/rule_")) == pytest.approx(1)
        assert line["throughput/samples_per_second"] > 0 and line["memory/peak_gib"] > 0
    assert "Firing of rules" in (trained / "adapter" / "report.html").read_text()


def test_bad_input_ends_both_ranks_with_code_2_and_one_message(tiny: Tiny, tmp_path: Path) -> None:
    records = json.loads(tiny.data.read_text())
    records[3]["image"] = "single/missing.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = tiny.flags("router", tiny.base, tmp_path / "output", deepspeed=ZERO3, data_path=tmp_path / "data.json")
    code, output = launch_two_ranks(ROOT / "llava" / "train" / "train.py", *flags).finish(600)
    assert code == 2, output[-6000:]
    assert output.count("error: ") == 1 and "record 3" in output and "single/missing.png" in output
    assert "Traceback" not in output and "Loading weights" not in output
    assert not (tmp_path / "output").exists()
