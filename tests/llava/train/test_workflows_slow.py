"""LLaVA's road by its scripts: align a projector, finetune, update by low rank, tune to a task; on two CPU ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from launching import ROOT, Launch
from layouts import Parts, build_parts
from llava.conversation import get_template
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.train.stages import PARTS
from tiny_training import Tiny

pytestmark = pytest.mark.slow

FEW_STEPS = ["--max_steps", "2", "--warmup_ratio", "0", "--model_max_length", "256", "--disable_tqdm", "True"]
MOVED = {
    "pretrain": {"projector"},
    "finetune": {"projector", "decoder"},
    "lora": {"projector", "lora"},
    "task": {"projector", "decoder"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A tiny Llama and a tiny CLIP, each in a folder of its own."""
    return build_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def trained(tiny: Tiny, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The outputs of the four scripts, each made of what came before."""
    folder = tmp_path_factory.mktemp("workflows")
    records = [
        {**record, "conversations": record["conversations"][:2]} for record in json.loads(tiny.data.read_text())[:16]
    ]
    (folder / "captions.json").write_text(json.dumps([record for record in records if "image" in record]))
    (folder / "data.json").write_text(json.dumps(records))
    outputs = {name: folder / name for name in MOVED}
    vision = {"MODEL_PATH": parts.vicuna, "VISION_TOWER": parts.tower}
    scripts = {
        "pretrain": ("pretrain", {**vision, "DATA_PATH": folder / "captions.json"}),
        "finetune": ("finetune", {**vision, "PROJECTOR": outputs["pretrain"] / "mm_projector.bin"}),
        "lora": ("finetune_lora", {"MODEL_PATH": outputs["pretrain"]}),
        "task": ("finetune_task", {"MODEL_PATH": outputs["finetune"]}),
    }
    for name, (script, own) in scripts.items():
        shared = {"IMAGE_FOLDER": tiny.images, "DATA_PATH": folder / "data.json", "OUTPUT": outputs[name]}
        sizes = {"GLOBAL_BATCH": 4, "PER_DEVICE_BATCH": 1, "NUM_WORKERS": 0}
        variables = {key: str(value) for key, value in {**shared, **sizes, **own}.items()}
        code, output = Launch(["bash", ROOT / "scripts" / "v1_5" / f"{script}.sh", *FEW_STEPS], **variables).finish(600)
        assert code == 0, output[-6000:]
        assert "trained" in output and "tokens of" in output, "the check before it shows what is learned, and lengths"
    return outputs


@pytest.mark.parametrize("name", MOVED)
def test_each_script_trains_its_parts_on_two_ranks(trained: dict[str, Path], name: str) -> None:
    summary = json.loads((trained[name] / "stage.json").read_text())
    assert (summary["engine"], summary["world_size"], summary["steps"], summary["global_batch"]) == (
        "DeepSpeedEngine", 2, 2, 4
    )  # fmt: skip
    assert summary["zero_stage"] == (2 if name == "pretrain" else 3)
    assert summary["moved"] == {part: part in MOVED[name] for part in PARTS}


@pytest.mark.parametrize("name", MOVED)
@torch.no_grad()
def test_each_output_is_loaded_as_llavas_users_do_and_answers(trained: dict[str, Path], name: str) -> None:
    tokenizer, model, image_processor, context = load_pretrained_model(str(trained[name]), None, "any", device="cpu")
    conversation = get_template("v1")
    conversation.append_message(conversation.roles[0], "<image>\nWhich digit?")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt").unsqueeze(0)
    image = Image.new("RGB", (48, 32), "red")
    pixels = process_images([image], image_processor, model.config).to(model.dtype)
    answer = model.generate(ids, images=pixels, image_sizes=[image.size], max_new_tokens=3, do_sample=False)
    assert 1 <= answer.shape[1] <= 3 and context > 0


def test_a_projector_is_handed_on_and_nothing_else_moves_in_pretraining(trained: dict[str, Path], parts: Parts) -> None:
    _, model, _, _ = load_pretrained_model(str(trained["pretrain"]), None, "any", device="cpu")
    written = torch.load(trained["pretrain"] / "mm_projector.bin", weights_only=True)
    weight = model.state_dict()["model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(written["model.mm_projector.0.weight"].to(weight.dtype), weight)
    for name, tensor in parts.weights.items():
        if "multi_modal_projector" not in name and "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(model.state_dict()[name], tensor.to(model.dtype)), name
