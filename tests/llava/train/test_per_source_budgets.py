"""Promises of skip targets per source: samples of a named source draw budgets whose mean is the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zero3_cases
from llava.data.dataset import SFTCollator
from llava.train.arguments import PlanArguments, parse_arguments
from llava.train.checks import check_inputs
from llava.train.routing_policies import BudgetedRouting, PerSourceBudgets, centred_interval
from llava.train.stages import StageInputError
from tiny_training import Tiny

IMAGE = 4


def test_pairs_are_read_as_written() -> None:
    assert PlanArguments(source_skip_ratios="ocr_vqa=0.2, gqa=0.4,a=b=0").source_targets() == {
        "ocr_vqa": 0.2,
        "gqa": 0.4,
        "a=b": 0.0,
    }


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("gqa", "has 'gqa'; SOURCE=RATIO pairs"),
        ("gqa=", "has 'gqa='"),
        ("=0.2", "has '=0.2'"),
        ("gqa=0.2,", "has ''"),
        ("gqa=0.2,gqa=0.3", "names gqa twice"),
        ("gqa=0.6", r"gqa=0.6 lies outside \[0, --max_skip_ratio 0.5\]"),
        ("gqa=-0.1", "gqa=-0.1 lies outside"),
        ("gqa=nan", "gqa=nan lies outside"),
    ],
)
def test_what_is_no_target_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PlanArguments(source_skip_ratios=text)


@pytest.mark.parametrize("target", [0.0, 0.1, 0.25, 0.4, 0.5])
def test_the_interval_of_a_target_is_the_widest_one_around_it(target: float) -> None:
    low, high = centred_interval(target, 0.5)
    assert (low + high) / 2 == pytest.approx(target)
    assert low == 0 or high == pytest.approx(0.5)
    assert 0 <= low <= high <= 0.5


@pytest.mark.parametrize("softness", [0.0, 0.1])
def test_a_source_draws_around_its_target_and_the_others_as_before(sft_dataset, softness: float) -> None:
    batch = SFTCollator(pad_token_id=3)(list(sft_dataset))
    sources = [record.source for record in sft_dataset.records]
    is_text = torch.tensor([source == "text" for source in sources])
    assert 0 < is_text.sum() < len(sources)
    budgets = PerSourceBudgets({"text": 0.4}, 0.5, sources.__getitem__)
    routing = BudgetedRouting(IMAGE, 0.5, budgets=budgets, softness=softness)
    torch.manual_seed(0)
    drawn = torch.stack([routing(batch).target_skip_ratio for _ in range(500)])
    torch.manual_seed(0)
    before = torch.stack([BudgetedRouting(IMAGE, 0.5)(batch).target_skip_ratio for _ in range(500)])
    assert torch.equal(drawn[:, ~is_text], before[:, ~is_text])
    text = drawn[:, is_text]
    assert text.mean() == pytest.approx(0.4, abs=0.01)
    assert 0.3 <= text.min() < 0.31 and 0.49 < text.max() <= 0.5


def test_a_stage_skips_where_its_targets_say(tiny: Tiny, tmp_path: Path) -> None:
    zero3_cases.run_case("router", tiny.flags("router", tiny.base, tmp_path / "router"))
    zero3_cases.reset()
    more = {"source_skip_ratios": "text=0", "per_device_train_batch_size": 12, "skip_data_check": True}
    flags = tiny.flags("adapter", tmp_path / "router", tmp_path / "adapter", **more)
    check_inputs(parse_arguments(flags))
    zero3_cases.run_case("adapter", flags)
    zero3_cases.reset()
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    rates: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("routing/skip_rate/source_"):
                rates.setdefault(name.removeprefix("routing/skip_rate/source_"), []).append(value)
    assert set(rates) > {"text"} and max(rates.pop("text")) == 0
    assert max(max(values) for values in rates.values()) > 0
    unknown = tiny.flags("adapter", tmp_path / "router", tmp_path / "other", **more | {"source_skip_ratios": "gqa=0.2"})
    with pytest.raises(StageInputError, match=r"names gqa, but the sources of .* are .*text"):
        check_inputs(parse_arguments(unknown))


@pytest.mark.parametrize("flags", [{"skip_pattern": "random"}, {"objective": "layer_regression"}])
def test_targets_are_refused_where_no_budget_is_drawn(tiny: Tiny, tmp_path: Path, flags: dict) -> None:
    flags = {"source_skip_ratios": "text=0.2", "skip_data_check": True, **flags}
    with pytest.raises(StageInputError, match="source_skip_ratios text=0.2 was given, but nothing follows a plan"):
        check_inputs(parse_arguments(tiny.flags("adapter", tiny.base, tmp_path / "output", **flags)))
