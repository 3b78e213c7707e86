"""The list of differences between RoE's published code and this implementation, and proof that each is one."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch

from fuzzyroe.routers.roe.tokens import RoEPass
from fuzzyroe.routers.roe.training import (
    OURS,
    PRESETS,
    PUBLISHED,
    Relaxation,
    RoECompat,
    routing_objective,
    run_progress,
)
from golden_roe import NUM_TOKENS, build_model, golden, prompts, training_batch

DIFFERENCES = {
    # switch: (ours, published)
    "tokens_in_front": (False, True),
    "image_segment_takes_one_more": (False, True),
    "tokens_take_positions": (False, True),
    "ties_skip": (False, True),
    "batch_decides_together": (False, True),
    "whole_units": (False, True),
}


def test_every_difference_is_listed_here() -> None:
    ours, published = asdict(OURS), asdict(PUBLISHED)
    assert {name: (ours[name], published[name]) for name in ours if ours[name] != published[name]} == DIFFERENCES
    assert {item.name for item in fields(RoECompat)} == {*DIFFERENCES, "damping"}
    assert OURS.damping == PUBLISHED.damping == 5.0  # 1 in the published evaluation code


@torch.no_grad()
def train_pass(compat: RoECompat) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep weights of a golden training setting, (L, B, T), and which turns there are, (B, T)."""
    model = build_model(compat)
    inputs, _, state = training_batch(model)
    state.roe = RoEPass(Relaxation(*golden("stage1b/cfg").tolist()[1:3]))
    model(**inputs, routing=state, use_cache=False)
    return state.result.keep_weights.permute(2, 0, 1), state.turn_mask()


@pytest.mark.parametrize("name", ["tokens_in_front", "image_segment_takes_one_more", "tokens_take_positions"])
def test_each_switch_of_the_layout_is_needed_for_the_golden_weights(name: str) -> None:
    expected = golden("stage1b/router_weight")[:, :, 1:, 0]
    with_all, known = train_pass(PUBLISHED)
    without, _ = train_pass(replace(PUBLISHED, **{name: False}))
    assert (with_all - expected)[:, known].abs().max() < 2e-5
    assert (without - expected)[:, known].abs().max() > 1e-3


def test_ties_skip_only_as_published() -> None:
    for compat, kept in ((OURS, True), (PUBLISHED, False)):
        model = build_model(compat)
        for linear in model.model.router.layers:
            torch.nn.init.zeros_(linear.weight)
        inputs, state = prompts(model, "eval_b1_0")
        model(**inputs, routing=state)
        assert state.kept_layers().all() == kept and state.kept_layers().any() == kept


def test_the_batch_decides_together_only_as_published() -> None:
    found = {}
    for together in (True, False):
        model = build_model(replace(PUBLISHED, batch_decides_together=together))
        inputs, state = prompts(model, "eval_b2")
        model(**inputs, routing=state)
        found[together] = state.kept_layers()
    assert (found[True][0] == found[True][1]).all() and not (found[False][0] == found[False][1]).all()


def test_whole_units_end_phases_early() -> None:
    assert run_progress(60, 399, PUBLISHED) == pytest.approx(0.3)
    assert run_progress(60, 399, OURS) == pytest.approx(60 / 399)


def test_the_published_damping_is_the_golden_one() -> None:
    logits, labels = golden("stage1b/logits")[:, NUM_TOKENS:], golden("prep/labels")[:, NUM_TOKENS:]
    keep, turns = 1 - golden("stage1b/skip_per_layer").T.unsqueeze(1), torch.ones(3, 1, dtype=torch.bool)
    expected = float(golden("stage1b/loss"))
    assert float(routing_objective(logits, labels, keep, turns, 0.4, 5.0).loss) == pytest.approx(expected, abs=2e-5)
    assert float(routing_objective(logits, labels, keep, turns, 0.4, 1.0).loss) > expected + 1e-3


def test_switches_survive_a_checkpoint_and_unknown_ones_are_refused() -> None:
    for compat in PRESETS.values():
        assert RoECompat.from_dict(json.loads(json.dumps(compat.to_dict()))) == compat
    options: dict[str, Any] = {"tokens_in_the_middle": True}
    with pytest.raises(ValueError, match="Unknown RoE switches .*tokens_in_the_middle.*known are tokens_in_front"):
        RoECompat.from_dict(options)
