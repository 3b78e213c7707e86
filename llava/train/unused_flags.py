"""Refusal of flags that a stage has nothing to do with, so that whatever is given acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from llava.train.arguments import LlavaTrainingArguments, RoutingArguments
from llava.train.stages import Stage, StageInputError

BACKBONE = {"vision_tower", "projector", "decoder", "lora"}
"""Parts that learn at the rate of the backbone."""

Use = tuple[Callable[[Stage], bool], str]


def _trains(*parts: str) -> Callable[[Stage], bool]:
    return lambda stage: bool(set(parts) & set(stage.trains))


_CALIBRATION: Use = (lambda stage: stage.calibrates, "calibrates no router")
_PLANNED_FIT: Use = (lambda stage: stage.calibrates and stage.routing == "plan", "calibrates no router")
_PLANNED_TRAINING: Use = (lambda stage: stage.routing == "plan" and bool(stage.trains), "trains along no plan")

USES: dict[str, Use] = {
    "skip_ratio": (lambda stage: stage.routing != "off", "skips nothing"),
    "max_skip_ratio": (lambda stage: stage.routing == "plan" or stage.calibrates, "has no plans"),
    "adapter_hidden_dim": (lambda stage: stage.routing != "off", "has no adapters"),
    "router": (lambda stage: stage.routing == "plan", "has no plans"),
    "rule_base": (lambda stage: stage.routing == "plan", "has no rules"),
    "skip_pattern": _PLANNED_TRAINING,
    "dense_ratio": _PLANNED_TRAINING,
    "skip_loss_weight": (lambda stage: stage.routing == "relaxed", "has no hinge on the skip rate"),
    "calibration_samples": _PLANNED_FIT,
    "order_samples": _PLANNED_FIT,
    "score_samples": _PLANNED_FIT,
    "per_layer_tables": _PLANNED_FIT,
    "calibration_batch_size": _CALIBRATION,
    "roe_lr": (_trains("adapter", "router"), "trains neither adapters nor routers"),
    "backbone_lr": (_trains(*BACKBONE), "trains no part of the backbone"),
    "mm_projector_lr": (_trains("projector"), "does not train the projector"),
    "lora_r": (_trains("lora"), "trains no low-rank updates"),
    "lora_alpha": (_trains("lora"), "trains no low-rank updates"),
    "lora_dropout": (_trains("lora"), "trains no low-rank updates"),
}
"""Flag -> whether a stage uses it, and why not where it does not; flags that are not listed act in every stage."""


def is_used(name: str, stage: Stage) -> bool:
    """Whether a flag of this name can act in a stage."""
    return name not in USES or USES[name][0](stage)


def check_unused(stage: Stage, routing_args: RoutingArguments, training_args: LlavaTrainingArguments) -> None:
    """Refuse the first flag that was given a value of its own and that nothing would act on.

    Raises:
        StageInputError: Naming the flag and why the stage has no use for it.
    """
    for arguments in (routing_args, training_args):
        for item in fields(arguments):
            found = getattr(arguments, item.name)
            if found != _default_of(item) and not is_used(item.name, stage):
                raise StageInputError(
                    f"--{item.name} {found} was given, but stage {stage.name} {USES[item.name][1]}; leave it out."
                )
    if routing_args.dense_ratio and routing_args.skip_pattern == "random":
        raise StageInputError(
            f"--dense_ratio {routing_args.dense_ratio} is of planned samples, --skip_pattern random plans none; "
            "leave one of the two out."
        )


def _default_of(item: Any) -> Any:
    return item.default if item.default is not MISSING else item.default_factory()
