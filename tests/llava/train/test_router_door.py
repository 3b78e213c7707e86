"""A router is one class and one entry of ROUTERS: stages attach, fit, follow, train along, save and load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fuzzyroe.attach import find_decoder
from fuzzyroe.routers import ROUTERS, Router
from fuzzyroe.routers.base import Measurer
from fuzzyroe.routing_state import RoutingState
from llava.model.builder import load_checkpoint
from llava.train.arguments import parse_arguments
from llava.train.checks import check_inputs
from llava.train.stage import run_stage
from tiny_training import NUM_LAYERS, Tiny


class OneLayerRouter(Router):
    """Skips a share of one layer; fitting finds the layer whose absence hurts least."""

    is_plan_router = True
    option_names = ("layer", "target_skip_ratio")

    def __init__(self, num_layers: int, layer: int = 1, target_skip_ratio: float = 0.0) -> None:
        super().__init__()
        self.num_layers, self.layer = num_layers, layer
        self.set_skip_rate(target_skip_ratio)

    @property
    def max_skip_ratio(self) -> float:
        return 1 / self.num_layers

    def plan(self, hidden_states: Tensor, routing: RoutingState) -> None:
        ratios = self.requested_ratios(routing, hidden_states.device)  # (B, 1) or (1, 1)
        keep = torch.ones(len(hidden_states), routing.planned_turns(), self.num_layers)
        keep[..., self.layer] = 1 - (ratios * self.num_layers).clamp(max=1)
        routing.result.keep_weights = keep

    def fit(self, measurer: Measurer, arguments: Any) -> tuple[Router, dict[str, Any]]:
        layer = measurer.find_order()[0]
        return OneLayerRouter(self.num_layers, layer, arguments.target_skip_ratio), {"layer": layer}


def run(words: list[str]) -> dict:
    arguments = parse_arguments(words)
    check_inputs(arguments)
    return run_stage(arguments)


def test_a_router_needs_a_class_and_an_entry(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "one_layer", OneLayerRouter)
    found = run(tiny.flags("router", tiny.base, tmp_path / "router", router="one_layer"))["calibration"]
    assert found["layer"] in range(1, NUM_LAYERS) and found["passes"] > 0
    summary = run(tiny.flags("adapter", tmp_path / "router", tmp_path / "adapter", max_steps=2))
    assert summary["steps"] == 2 and summary["moved"]["adapter"]
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["routing/skip_rate"] for line in lines if "routing/skip_rate" in line]
    assert len(skipped) == 2 and all(0 < rate <= 1 / NUM_LAYERS for rate in skipped)
    router = find_decoder(load_checkpoint(tmp_path / "adapter").model).router
    assert type(router) is OneLayerRouter and (router.layer, router.target_skip_ratio) == (found["layer"], 0.25)


def test_it_is_a_choice_like_the_others(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.flags("router", tiny.base, tmp_path / "out", router="one_layer")
    with pytest.raises((ValueError, SystemExit)):
        parse_arguments(words)
    monkeypatch.setitem(ROUTERS, "one_layer", OneLayerRouter)
    assert parse_arguments(words)[2].router == "one_layer"
    with pytest.raises(ValueError, match="--rule_base default .* a one_layer router has no score"):
        check_inputs(parse_arguments([*words, "--rule_base", "default"]))
