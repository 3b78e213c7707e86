"""Skip rates of single tasks of one evaluation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.utils import simple_parse_args_string
from PIL import Image

from fuzzyroe import detach
from llava.eval import lmms_model
from llava.eval.lmms_model import FuzzyRoE, parse_task_rates
from llava.model.builder import Checkpoint, load_checkpoint
from llava.report.evaluation import read_routing_log
from routed_llava import route
from tiny_training import make_tiny

TEXTS = ["w1 w2 ?", "w3 ?", "w4 w5 w6 w7 ?", "w8 w9 ?", "w10 w11 w12 ?", "w13 w14 w15 w16 w17 ?"]
TASKS = ["pope", "mme", "toy", "toy", "mme", "pope"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense checkpoint."""
    return make_tiny(tmp_path_factory.mktemp("tiny")).base


@pytest.fixture
def fuzzy(folder: Path) -> Checkpoint:
    """The checkpoint with a fuzzy router whose own rate is 1/3."""
    checkpoint = load_checkpoint(folder)
    route(checkpoint.model)
    checkpoint.model.get_decoder().router.set_skip_rate(1 / 3)
    checkpoint.model.get_decoder().router.enabled = True
    return checkpoint


def answer(checkpoint: Checkpoint, log: Path, monkeypatch: pytest.MonkeyPatch, **arguments) -> list:
    """Answer the requests of three tasks; gives texts, kept layers and targets, in the order of the requests."""
    monkeypatch.setattr(lmms_model, "load_checkpoint", lambda *args, **kwargs: checkpoint)
    model = FuzzyRoE("tiny", conv_template="digits", device="cpu", routing_log=str(log), **arguments)
    image = Image.new("RGB", (32, 32), "red")
    for task in set(TASKS):
        model.task_dict[task] = {"test": [{"image": image}] * len(TEXTS)}
    requests = [
        Instance(
            "generate_until",
            (text, {"max_new_tokens": 3}, lambda doc: [doc["image"]], index, task, "test"),
            0,
            {"task": task, "doc_id": index, "repeats": 1},
        )
        for index, (text, task) in enumerate(zip(TEXTS, TASKS, strict=True))
    ]
    texts = model.generate_until(requests)
    records = sorted(read_routing_log(log), key=lambda record: record.doc_id)
    return [(text, record.kept_layers, record.target_skip_ratio) for text, record in zip(texts, records, strict=True)]


def test_pairs_pass_lmms_evals_parser() -> None:
    arguments = simple_parse_args_string("pretrained=x,skip_rate=0.3,task_skip_rates=pope:0.4/mme:off/a:b:0")
    assert parse_task_rates(arguments["task_skip_rates"]) == {"pope": 0.4, "mme": None, "a:b": 0.0}
    assert parse_task_rates(None) == {}


@pytest.mark.parametrize("schedule", ["plan", "arrival"])
@pytest.mark.parametrize("rate", [None, 0.2])
def test_every_task_runs_at_its_own_rate(
    fuzzy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, rate: float | None
) -> None:
    rates, own = {"pope": 0.5, "mme": "off"}, {} if rate is None else {"skip_rate": rate}
    alone = {}
    for task, one in {"toy": own, **{task: {"skip_rate": asked} for task, asked in rates.items()}}.items():
        alone[task] = answer(fuzzy, tmp_path / "alone.jsonl", monkeypatch, batch_size=2, **one)
        fuzzy.model.get_decoder().router.set_skip_rate(1 / 3)
        fuzzy.model.get_decoder().router.enabled = True
    pairs = "/".join(f"{task}:{asked}" for task, asked in rates.items())
    arguments = {"batch_size": 2, "schedule": schedule, "task_skip_rates": pairs, **own}
    found = answer(fuzzy, tmp_path / "log.jsonl", monkeypatch, **arguments)
    assert found == [alone[task][index] for index, task in enumerate(TASKS)]
    assert [target for *_, target in found] == [{"pope": 0.5, "mme": None}.get(t, rate or 0.333333) for t in TASKS]
    assert len({tuple(kept) for _, kept, _ in found}) > 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("pope", "'pope' is no TASK:RATE"),
        (":0.2", "':0.2' is no TASK:RATE"),
        ("pope:0.2/", "'' is no TASK:RATE"),
        ("pope:0.2/pope:0.3", "'pope:0.3' is there twice"),
        ("pope:much", "task_skip_rates, pope: skip_rate is 'much'"),
        (0.3, "'0.3' is no TASK:RATE"),
    ],
)
def test_pairs_that_cannot_be_read_are_refused_before_anything_is_loaded(text: str | float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FuzzyRoE("nowhere", device="cpu", task_skip_rates=text)


def test_rates_that_cannot_be_met_are_refused(
    fuzzy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="task_skip_rates names vqa, but this run has the tasks mme, pope, toy"):
        answer(fuzzy, tmp_path / "log", monkeypatch, task_skip_rates="vqa:0.2")
    with pytest.raises(ValueError, match="Skip rate 0.99 lies outside"):
        answer(fuzzy, tmp_path / "log", monkeypatch, task_skip_rates="pope:0.99")
    router = fuzzy.model.get_decoder().router
    router.target_skip_ratio.fill_(math.nan)
    with pytest.raises(ValueError, match="give skip_rate as well"):
        answer(fuzzy, tmp_path / "log", monkeypatch, task_skip_rates="pope:0.2")
    detach(fuzzy.model)
    with pytest.raises(ValueError, match="asked of a dense checkpoint"):
        answer(fuzzy, tmp_path / "log", monkeypatch, task_skip_rates="pope:0.2")
