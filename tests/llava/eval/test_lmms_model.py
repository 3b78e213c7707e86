"""The lmms-eval model: its arguments, the order of its answers, its routing log."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2
from PIL import Image

from llava.eval import lmms_model
from llava.eval.lmms_model import FuzzyRoE
from llava.eval.lmms_plugin import manifest
from llava.model.builder import Checkpoint
from llava.report.evaluation import read_routing_log

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["w1 w2 ?", "w3 ?", "w4 w5 w6 w7 ?", "w8 w9 ?", "w10 w11 w12 ?"]
HAS_IMAGE = [True, False, True, True, False]


@pytest.fixture
def build(routed: Checkpoint, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch):
    """A function from model arguments to the model, with a task of five documents."""
    monkeypatch.setattr(lmms_model, "load_checkpoint", lambda *args, **kwargs: routed)

    def build(**arguments) -> FuzzyRoE:
        model = FuzzyRoE(pretrained="tiny", **{"conv_template": "digits", "device": "cpu", **arguments})
        documents = [
            {"image": images[index % 3] if has_image else None, "type": f"kind{index % 2}", "complexity": index}
            for index, has_image in enumerate(HAS_IMAGE)
        ]
        model.task_dict["toy"] = {"test": documents}
        return model

    return build


def make_requests(kwargs: dict | None = None, **metadata) -> list[Instance]:
    """The requests of the task, in its order."""

    def doc_to_visual(doc: dict) -> list | None:
        return [doc["image"]] if doc["image"] else None

    return [
        Instance(
            "generate_until",
            (text, {"max_new_tokens": 5, "until": ["\n\n"]} | (kwargs or {}), doc_to_visual, index, "toy", "test"),
            0,
            {"task": "toy", "doc_id": index, "repeats": 1, **metadata},
        )
        for index, text in enumerate(TEXTS)
    ]


def test_answers_keep_the_order_of_the_requests_and_do_not_depend_on_the_batch_size(build) -> None:
    alone = build(batch_size=1).generate_until(make_requests())
    assert len(set(alone)) == len(TEXTS)
    for batch_size in (2, 3, "8"):
        assert build(batch_size=batch_size).generate_until(make_requests()) == alone


def test_requests_with_other_options_do_not_share_a_batch(build, tmp_path: Path) -> None:
    model = build(batch_size=8, routing_log=str(tmp_path / "log.jsonl"))
    requests = make_requests()[:3] + make_requests({"max_new_tokens": 2})[3:]
    model.generate_until(requests)
    records = {record.doc_id: record for record in read_routing_log(tmp_path / "log.jsonl")}
    assert [records[index].batch_size for index in range(5)] == [3, 3, 3, 2, 2]
    assert records[3].num_new_tokens <= 2


def test_the_log_says_what_every_request_ran(build, tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    model = build(batch_size=2, routing_log=str(path), skip_rate=0.4)
    model.generate_until(make_requests())
    records = sorted(read_routing_log(path), key=lambda record: record.doc_id)
    assert [record.doc_id for record in records] == list(range(5))
    for record, text, has_image in zip(records, TEXTS, HAS_IMAGE, strict=True):
        num_words = len(text.split())
        # behind an image the question is its words with "ASSISTANT :", without one also "<s> USER :"
        length = num_words + 2 + (0 if has_image else 3)
        assert record.kept_layers == [int((length + layer) % 3 != 0) for layer in range(4)]
        assert record.num_prompt_tokens == num_words + 5 + 16 * has_image
        assert (record.num_images, record.checkpoint, record.target_skip_ratio) == (int(has_image), "tiny", 0.4)
        assert (record.type, record.complexity) == (f"kind{record.doc_id % 2}", record.doc_id)
        assert record.prefill_ms > 0 and record.decode_ms_per_token > 0


def test_the_shares_of_a_batch_follow_the_prompt_tokens(build, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    build(batch_size=8, routing_log=str(path)).generate_until(make_requests())
    per_token = {round(record.prefill_ms / record.num_prompt_tokens, 9) for record in read_routing_log(path)}
    assert len(per_token) == 1


@pytest.mark.parametrize("schedule", ["plan", "arrival"])
def test_answers_and_log_do_not_depend_on_the_schedule(build, tmp_path: Path, schedule) -> None:
    expected = build(batch_size=1).generate_until(make_requests())
    path = tmp_path / "log.jsonl"
    assert build(batch_size=2, schedule=schedule, routing_log=str(path)).generate_until(make_requests()) == expected
    records = {record.doc_id: record for record in read_routing_log(path)}
    assert sorted(records) == list(range(5))
    assert [records[index].complexity for index in range(5)] == list(range(5))
    assert {record.batch_size for record in records.values()} == {1, 2}


def test_images_take_as_many_positions_as_visual_tokens_says(build, tmp_path: Path) -> None:
    lengths = {}
    for number in (16, 3):
        path = tmp_path / f"{number}.jsonl"
        build(batch_size=2, visual_tokens=number, routing_log=str(path)).generate_until(make_requests())
        lengths[number] = {record.doc_id: record.num_prompt_tokens for record in read_routing_log(path)}
    assert all(lengths[16][i] - lengths[3][i] == (13 if HAS_IMAGE[i] else 0) for i in range(5))


def test_the_score_may_choose_the_number_of_visual_tokens(build, routed: Checkpoint, tmp_path: Path) -> None:
    router = routed.model.get_decoder().router
    # by length of the question, whose plans the tests' router makes too
    type(router).percentiles = staticmethod(lambda scores: scores)
    plan = type(router).plan

    def scored(self, states, routing) -> None:
        plan(self, states, routing)
        routing.result.scores = (routing.question_mask.sum(dim=1, keepdim=True) > 6).float()

    type(router).plan = scored
    try:
        path = tmp_path / "log.jsonl"
        model = build(batch_size=2, visual_tokens="2/9", routing_log=str(path))
        answers = model.generate_until(make_requests())
        found = {record.doc_id: record.num_prompt_tokens for record in read_routing_log(path)}
        assert build(batch_size=1, visual_tokens="2/9").generate_until(make_requests()) == answers
    finally:
        type(router).plan = plan
        del type(router).percentiles
    text = {index: len(routed.tokenizer(TEXTS[index]).input_ids) for index in range(5)}
    taken = {index: found[index] - text[index] for index in range(5) if HAS_IMAGE[index]}
    assert len(set(taken.values())) == 2 and max(taken.values()) - min(taken.values()) == 7


def test_the_template_is_the_one_of_the_training(build, routed: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    routed.model.config.conv_template = "digits"
    expected = build(conv_template="digits").generate_until(make_requests())
    assert build(conv_template=None).generate_until(make_requests()) == expected and not caplog.records
    assert build(conv_template="v1").generate_until(make_requests()) != expected
    assert "conv_template is v1, but the checkpoint was trained with digits" in caplog.text


def test_off_is_the_dense_model(build, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    build(skip_rate="off", routing_log=str(path)).generate_until(make_requests())
    records = read_routing_log(path)
    assert all(record.kept_layers == [1, 1, 1, 1] and record.skip_rate == 0 for record in records)
    assert {record.target_skip_ratio for record in records} == {None}


def test_without_a_skip_rate_the_checkpoint_decides(build, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    build(routing_log=str(path)).generate_until(make_requests())
    assert {record.target_skip_ratio for record in read_routing_log(path)} == {0.3}


def test_requests_that_only_fill_up_a_process_are_not_logged(build, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    requests = make_requests()[:3] + make_requests(__padding_only__=True)[3:]
    assert len(build(routing_log=str(path)).generate_until(requests)) == 5
    assert sorted(record.doc_id for record in read_routing_log(path)) == [0, 1, 2]


def test_an_earlier_log_does_not_outlive_the_start_of_a_run(build, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("an earlier run\n")
    build(routing_log=str(path))
    assert not path.exists()


def test_unknown_arguments_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(TypeError, match="skiprate, which fuzzyroe does not know; it knows pretrained, skip_rate"):
        FuzzyRoE.create_from_arg_string("pretrained=nowhere,skiprate=0.3", {"batch_size": 1})


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"skip_rate": "dense"}, ValueError, "skip_rate is 'dense'"),
        ({"batch_size": "auto"}, ValueError, "batch_size is 'auto'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'"),
        ({"conv_template": "v9"}, KeyError, "Conversation template 'v9' is unknown"),
        ({"schedule": "random"}, ValueError, "schedule is 'random'; use one of plan, arrival"),
        ({"visual_tokens": "few"}, ValueError, "visual_tokens is 'few'"),
        ({"visual_tokens": "4/0"}, ValueError, "visual_tokens is '4/0'"),
        ({"visual_tokens": 17}, ValueError, "num_kept is 17"),
    ],
)
def test_values_that_are_not_allowed_are_refused(build, arguments: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        build(**arguments)


def test_a_skip_rate_asked_of_a_dense_checkpoint_is_refused(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmms_model, "load_checkpoint", lambda *args, **kwargs: checkpoint)
    FuzzyRoE("tiny", device="cpu", skip_rate="off")
    with pytest.raises(ValueError, match="asked of a dense checkpoint"):
        FuzzyRoE("tiny", device="cpu", skip_rate=0.3)


def test_model_args_win_over_the_batch_size_that_lmms_eval_always_passes(build) -> None:
    del build  # only loads nothing
    model = FuzzyRoE.create_from_arg_string("pretrained=tiny,batch_size=4", {"batch_size": 1, "device": "cpu"})
    assert model.batch_size == 4 and model.device.type == "cpu"
    assert FuzzyRoE.create_from_arg_string("pretrained=tiny", {"batch_size": "7", "device": "cpu"}).batch_size == 7


def test_other_kinds_of_requests_are_refused_by_name(build) -> None:
    model = build()
    with pytest.raises(NotImplementedError, match="Task toy asks for log-likelihoods"):
        model.loglikelihood(make_requests())
    with pytest.raises(NotImplementedError, match="Task toy asks for several rounds"):
        model.generate_until_multi_round(make_requests())


def test_visuals_that_are_no_images_are_refused(build) -> None:
    model = build()
    model.task_dict["toy"]["test"][0]["image"] = "video.mp4"
    with pytest.raises(ValueError, match="Task toy gave a str"):
        model.generate_until(make_requests())


def test_lmms_eval_finds_the_class_by_the_manifest() -> None:
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("fuzzyroe") is FuzzyRoE


def test_the_plug_in_is_light() -> None:
    program = "import sys, json, llava.eval.lmms_plugin; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lmms_eval"} & set(json.loads(result.stdout))
