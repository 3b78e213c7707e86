"""Prefill plans: prompts that are read once, decided once, and answered in any batch.

Vision tower, projector and a router that plans ahead run first, for a whole queue; a scheduler then sees every plan,
and nothing is computed twice: what they gave goes into the prefill as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fuzzyroe.attach import find_router
from fuzzyroe.routing_state import RoutingState
from llava.model.families import HostModel
from llava.model.token_pruning import plan_by_router


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt as it enters the first decoder layer.

    Attributes:
        states: States of its positions, without padding, (N, D).
        keep: True where it runs the layer, (L,) bool on the CPU.
    """

    states: Tensor
    keep: Tensor


def plans_ahead(model: HostModel) -> bool:
    """Say whether routing is on, by a router that decides before the first layer, and for good."""
    router = find_router(model)
    decides_later = getattr(router, "decides_layer_wise", False) or getattr(router, "escalation", None) is not None
    return bool(getattr(router, "enabled", False)) and not decides_later


def plan_prompts(model: HostModel, inputs: dict[str, Tensor]) -> list[PlannedPrompt]:
    """Plan a batch of encoded prompts, see ``plan_by_router``, and take it apart into B prompts without padding.

    Raises:
        ValueError: If the model does not plan ahead.
    """
    if not plans_ahead(model):
        raise ValueError(
            "The model does not plan ahead: its routing is off, absent, decides at each layer or is escalated. Let "
            "generate decide."
        )
    states, routing = plan_by_router(model, inputs)
    rows = zip(states, inputs["attention_mask"].bool(), routing.kept_layers(), strict=True)
    # clones, so that a prompt does not keep its whole batch in memory
    return [PlannedPrompt(states[is_token].clone(), keep) for states, is_token, keep in rows]


def generate_planned(model: Any, prompts: Sequence[PlannedPrompt], **options: Any) -> Any:
    """Continue planned prompts, in a batch of any of them.

    Args:
        model: The model that planned them, a ``LlavaLlamaForCausalLM``.
        prompts: At least one.
        **options: As for ``generate``, which gives the new tokens alone.
    """
    states = pad_sequence([prompt.states for prompt in prompts], batch_first=True, padding_side="left")
    lengths = torch.tensor([len(prompt.states) for prompt in prompts], device=states.device)
    mask = torch.arange(states.shape[1], device=states.device) >= states.shape[1] - lengths.unsqueeze(1)
    # generate repeats prompts for beams, but not what a state says of them
    copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
    keep = torch.stack([prompt.keep for prompt in prompts]).to(states.device).repeat_interleave(copies, dim=0)
    routing = RoutingState.from_batch({"attention_mask": mask.repeat_interleave(copies, dim=0)}).forced(keep)
    return model.generate(inputs_embeds=states, attention_mask=mask.long(), routing=routing, **options)
