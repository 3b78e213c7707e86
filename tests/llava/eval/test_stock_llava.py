"""lmms-eval's own ``llava`` class, as released, on our package: the answers are those of our plug-in, item by item."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.model.builder import load_checkpoint
from lmms_runs import ROOT, evaluate, write_work
from routed_checkpoints import write_routing

BASE = ROOT / "playground" / "digits" / "base"
NUM_TESTS = 36

pytestmark = pytest.mark.slow


def write_routed_checkpoint(folder: Path) -> None:
    """The playground's trained base model, routed by the shipped rule base so that items differ in their layers."""
    checkpoint = load_checkpoint(BASE)
    folder.mkdir()
    write_routing(checkpoint.model, folder, base_model=str(BASE))
    checkpoint.tokenizer.save_pretrained(folder)
    checkpoint.image_processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, ``task``, ``plugin`` and the checkpoint ``routed``."""
    folder = tmp_path_factory.mktemp("stock")
    write_work(folder, NUM_TESTS)
    write_routed_checkpoint(folder / "routed")
    return folder


@pytest.fixture(scope="module", params=["dense", "routed"])
def checkpoint(request, work: Path) -> Path:
    """A dense and a routed checkpoint."""
    return BASE if request.param == "dense" else work / "routed"


@pytest.fixture(scope="module")
def answers(checkpoint: Path, work: Path) -> dict[int, str]:
    """What our plug-in answers."""
    model_args = f"pretrained={checkpoint},conv_template=digits,device=cpu"
    return evaluate(work, work / f"plugin_{checkpoint.name}", "fuzzyroe", model_args, 8)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_stock_llava_gives_the_answers_of_the_plug_in(checkpoint: Path, work: Path, answers, batch_size: int) -> None:
    model_args = f"pretrained={checkpoint},conv_template=digits,device=cpu,device_map=auto"
    stock = evaluate(work, work / f"stock_{checkpoint.name}_{batch_size}", "llava", model_args, batch_size)
    assert len(stock) > NUM_TESTS and stock.keys() == answers.keys()
    differing = {item for item, answer in stock.items() if answer != answers[item]}
    records = json.loads((work / "data" / "digits_test.json").read_text())
    text_only = {item for item, record in enumerate(records) if "image" not in record}
    assert text_only and len(stock) - len(text_only) == NUM_TESTS
    # In a batch with images lmms-eval puts a line break in front of a question without one: that is another prompt.
    assert differing <= (text_only if batch_size > 1 else set())
    assert len(set(stock.values())) > 8, "the model says the same to everything"
