"""Promises of plans that harden during a stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zero3_cases
from llava.model.builder import load_checkpoint
from llava.train.arguments import parse_arguments
from llava.train.checks import check_inputs
from llava.train.routing_policies import ANNEALED, BudgetedRouting
from llava.train.stages import StageInputError
from routed_llava import route
from tiny_training import Tiny


def test_soft_plans_lie_on_the_side_of_the_hard_ones_and_meet_them(tiny: Tiny) -> None:
    router = route(load_checkpoint(tiny.base).model).get_decoder().router
    scores = torch.linspace(0, 1, 21).view(-1, 1)
    hard = router.keep_weights(scores, 0.4)
    assert 0 < hard.mean() < 1
    for softness in (0.3, 0.05):
        soft = router.keep_weights(scores, 0.4, softness)
        assert torch.equal(soft >= 0.5, hard >= 0.5)
        assert torch.equal(soft[..., 0], torch.ones_like(soft[..., 0])), "layer 0 is never skipped"
        assert ((soft > 0.01) & (soft < 0.99)).any()
    assert (router.keep_weights(scores, 0.4, 1e-6) - hard).abs().max() <= 0.5


def test_softness_depends_on_the_step_alone_and_ends_at_zero() -> None:
    routing = BudgetedRouting(4, 0.5, softness=0.2)
    assert routing.softness_at(0) == 0.2 and routing.softness_at(ANNEALED) == routing.softness_at(1) == 0
    assert routing.softness_at(ANNEALED / 2) == pytest.approx(0.1)
    ids = torch.tensor([[1, 7, 7, 8, 9]])
    batch = {"input_ids": ids, "labels": ids, "turn_ids": torch.ones_like(ids)}
    assert routing(batch, 4, 10).softness == pytest.approx(0.1)
    assert routing(batch, 8, 10).softness == 0


def test_an_annealed_stage_begins_soft_and_ends_hard(tiny: Tiny, tmp_path: Path) -> None:
    zero3_cases.run_case("router", tiny.flags("router", tiny.base, tmp_path / "router"))
    zero3_cases.reset()
    more = {"anneal_softness": 0.2, "max_steps": 5, "per_device_train_batch_size": 4, "skip_data_check": True}
    flags = tiny.flags("adapter", tmp_path / "router", tmp_path / "adapter", **more)
    check_inputs(parse_arguments(flags))
    zero3_cases.run_case("adapter", flags)
    zero3_cases.reset()
    lines = (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()
    entropies = [line["routing/keep_weight_entropy"] for line in map(json.loads, lines) if "loss" in line]
    assert entropies[0] > 0.01 and entropies[-1] == 0


@pytest.mark.parametrize("stage, flags", [
    ("dense", {}),
    ("adapter", {"train_hard_skip": True}),
    ("adapter", {"skip_pattern": "random"}),
])  # fmt: skip
def test_annealing_is_refused_where_no_plan_can_be_soft(tiny: Tiny, tmp_path: Path, stage: str, flags: dict) -> None:
    flags = {"anneal_softness": 0.1, "skip_data_check": True, **flags}
    if stage == "adapter":
        flags.setdefault("skip_pattern", "random")
    with pytest.raises(StageInputError, match="anneal_softness 0.1 was given"):
        check_inputs(parse_arguments(tiny.flags(stage, tiny.base, tmp_path / "output", **flags)))
