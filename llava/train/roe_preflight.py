"""Refusal of flags and checkpoints that RoE's stages cannot run on, or that they alone can."""

from __future__ import annotations

from fuzzyroe.schedule import start_bias
from llava.train.arguments import RoutingArguments
from llava.train.stages import STAGES, Stage, StageInputError


def check_roe(block: dict | None, stage: Stage, model_path: str, routing_args: RoutingArguments) -> None:
    """Check what RoE's stages need, and that their flags were given to none other.

    Args:
        block: The ``fuzzyroe`` block of the checkpoint; None for a dense one.
        stage: The stage.
        model_path: Checkpoint that it starts from.
        routing_args: The flags.

    Raises:
        StageInputError: If a flag has nothing to act on, or the checkpoint is of another method.
    """
    _check_flags(block, stage, model_path, routing_args)
    router = (block or {}).get("router", "fuzzy")
    if stage.routing == "plan" and block and router == "linear":
        raise StageInputError(
            f"{model_path} has linear routers, stage {stage.name} fits fuzzy ones; name a checkpoint of the router "
            f"stage, or one of the stages {', '.join(_relaxed())}."
        )
    if stage.routing != "relaxed":
        return
    if block and router != "linear":
        raise StageInputError(
            f"{model_path} is routed by a {router} router, stage {stage.name} trains linear ones; start from a dense "
            "checkpoint with --stage roe_adapter."
        )
    if not block and stage.span[0] > 0 and not routing_args.freeze_adapters:
        raise StageInputError(
            f"Stage {stage.name} goes on with adapters that are trained, but {model_path} is dense; run roe_adapter "
            "first."
        )
    try:
        start_bias(routing_args.skip_ratio)
    except ValueError as error:
        raise StageInputError(f"--skip_ratio: {error}") from error


def _check_flags(block: dict | None, stage: Stage, model_path: str, routing_args: RoutingArguments) -> None:
    is_relaxed = stage.routing == "relaxed"
    for name in ("routing_summary", "roe_compat"):
        given = getattr(routing_args, name)
        if given is not None and not is_relaxed:
            raise StageInputError(
                f"--{name} {given} is about linear routers, stage {stage.name} has none; leave it out, or use one of "
                f"the stages {', '.join(_relaxed())}."
            )
        if given is not None and block:
            raise StageInputError(
                f"--{name} {given} was given, but {model_path} has a router already; leave it out, or start from a "
                "dense checkpoint."
            )
    if routing_args.router_lr is not None and "router" not in stage.trains:
        raise StageInputError(
            f"--router_lr {routing_args.router_lr} was given, but stage {stage.name} trains no router; leave it out."
        )
    if is_relaxed and (routing_args.rule_base is not None or routing_args.skip_pattern != "plan"):
        name = "rule_base" if routing_args.rule_base is not None else "skip_pattern"
        raise StageInputError(
            f"--{name} {getattr(routing_args, name)} was given, but stage {stage.name} trains linear routers by RoE's "
            "schedule; leave it out."
        )


def _relaxed() -> list[str]:
    return [name for name, stage in STAGES.items() if stage.routing == "relaxed"]
