"""Training that leaves out skipped layers instead of weighting them with zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava.train.arguments import LlavaTrainingArguments
from llava.train.engine import make_leaf_layers
from llava.train.stages import Stage, StageInputError


def check_hard_skip(stage: Stage, training_args: LlavaTrainingArguments) -> None:
    """Refuse ``--train_hard_skip`` where it cannot work.

    Raises:
        StageInputError: If the stage plans no layers ahead, or ranks that skip different layers would disagree about
            the gradients they exchange.
    """
    if stage.routing != "plan" or not stage.trains:
        raise StageInputError(
            f"--train_hard_skip was given, but stage {stage.name} trains along no plans; leave it out, or use one of "
            "the stages adapter and finetune."
        )
    config = training_args.deepspeed
    if isinstance(config, str):
        config = json.loads(Path(config).read_text())
    zero_stage = (config or {}).get("zero_optimization", {}).get("stage", 0)
    if training_args.world_size > 1 and zero_stage != 3:
        raise StageInputError(
            f"--train_hard_skip was given with {training_args.world_size} processes and ZeRO stage {zero_stage}, where "
            "ranks that skip different layers exchange gradients of different parameters; use scripts/zero3.json, or "
            "leave it out."
        )


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
