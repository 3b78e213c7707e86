"""Prompts with answers, for searches and criteria that look at losses."""

from __future__ import annotations

from torch import Tensor

from fuzzyroe.routers.oracle import LabelledBatch
from fuzzyroe.routing_state import RoutingState


def labelled(inputs: dict[str, Tensor], num_answer: int = 2) -> LabelledBatch:
    """Give left-padded prompts whose last tokens are the answer."""
    labels = inputs["input_ids"].clone()
    labels[:, :-num_answer] = -100
    routing = RoutingState.from_batch({"attention_mask": inputs["attention_mask"]})
    routing.question_mask[:, -num_answer:] = False
    return LabelledBatch(inputs, labels, routing)
