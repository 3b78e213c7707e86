"""What makes a checkpoint folder a routed one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from fuzzyroe.config import FuzzyRoEConfig
from fuzzyroe.routers.fuzzy import FuzzyRouter
from fuzzyroe.rules import load_rule_base
from fuzzyroe.state_dict import routing_state_dict, save_routing
from llava.model.checkpoints.routing import ROUTING_FILE
from llava.model.llava_llama import attach_routing


def write_routing(model: LlavaForConditionalGeneration, folder: Path, base_model: str | None = None) -> None:
    """Route a model by the shipped rules, evenly, at 0.25, and write what a checkpoint adds for that to ``folder``."""
    num_layers = model.config.text_config.num_hidden_layers
    router = FuzzyRouter(load_rule_base("default").interpolate(), num_layers, num_budgets=2)
    router.budget_ratios.copy_(torch.tensor([0.0, 0.5]))
    router.budget_thresholds[1] = torch.linspace(0, 1, num_layers)
    router.set_skip_rate(0.25)
    attach_routing(model, router, adapter_width=4)
    save_routing(routing_state_dict(model), folder / ROUTING_FILE)
    options = router.save_options(folder)
    config = FuzzyRoEConfig(adapter_width=4, router_options=options, base_model=base_model, stage="router")
    model.config.fuzzyroe = config.to_dict()
    model.config.save_pretrained(folder)
