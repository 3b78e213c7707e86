"""Training that leaves out skipped layers instead of weighting them with zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.train.arguments import LlavaTrainingArguments
from llava.train.engine import make_leaf_layers


def prepare_hard_skip(model: nn.Module, training_args: LlavaTrainingArguments) -> None:
    """Make a routed model ready; call before the engine exists.

    The input of the first layer is made to require a gradient: a leaf module hands its own gradients over when the
    gradient of its input is known, and with a frozen decoder a rank that skips nothing would have no graph at all.
    """
    model.enable_input_require_grads()
    if training_args.deepspeed:
        make_leaf_layers(model)


class ZeroMissingGradients(TrainerCallback):
    """Count what a step left out as gradient zero, as ZeRO-3 does, so that one process trains as several do.

    The optimizer leaves a parameter without a gradient alone, but moves one with gradient zero by its momentum.

    Args:
        model: The model that trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fill in the zeros."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None and not hasattr(parameter, "ds_id"):
                parameter.grad = torch.zeros_like(parameter)
