"""FuzzyRoE: layer skipping for Hugging Face decoders, routed by a fuzzy rule base.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from fuzzyroe import RoutingState, attach
>>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
>>> model = attach(LlamaForCausalLM(config).eval(), adapter_width=2)
>>> prompt = {"input_ids": torch.tensor([[1, 5, 7]]), "attention_mask": torch.ones(1, 3)}
>>> skip_the_second = RoutingState.from_batch(prompt).forced(torch.tensor([[True, False]]))
>>> _ = model(**prompt, routing=skip_the_second)
>>> skip_the_second.result.layer_runs
{0: 1, 1: 0}
"""

from __future__ import annotations

from typing import Any

from fuzzyroe.attach import attach, detach, find_router, set_escalation, set_router, set_skip_rate
from fuzzyroe.routing_state import RoutingState

__all__ = [
    "ROUTERS",
    "RoutingState",
    "attach",
    "detach",
    "find_router",
    "set_escalation",
    "set_router",
    "set_skip_rate",
]


def __getattr__(name: str) -> Any:
    """Import ``ROUTERS`` when it is asked for: the rules behind it load scikit-fuzzy."""
    if name == "ROUTERS":
        from fuzzyroe.routers import ROUTERS

        return ROUTERS
    raise AttributeError(f"module 'fuzzyroe' has no attribute '{name}'")
