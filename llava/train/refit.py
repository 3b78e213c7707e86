"""The routers that stages can fit by forward passes: making one, and fitting it again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fuzzyroe.attach import find_decoder
from fuzzyroe.calibrate import calibrate_router
from fuzzyroe.calibrate_layers import calibrate_layers
from fuzzyroe.routers import (
    FuzzyRouter,
    LinearRouter,
    LinearScoreRouter,
    PerLayerFuzzyRouter,
    RandomRouter,
    Router,
    StaticRouter,
)
from fuzzyroe.routers.roe.compat import PRESETS
from fuzzyroe.routers.roe.router import search_skip_logit_biases
from fuzzyroe.rules import load_rule_base
from llava.model.builder import Checkpoint
from llava.model.families import get_image_token_id
from llava.model.routing import attach_routing
from llava.train.arguments import (
    DEFAULT_ADAPTER_WIDTH,
    DEFAULT_COMPAT,
    DEFAULT_PLAN_ROUTER,
    DEFAULT_RULE_BASE,
    DEFAULT_SUMMARY,
    PlanArguments,
    RoEArguments,
    RoutedArguments,
)
from llava.train.calibrate import CalibrationSize, Measurer
from llava.train.trainer import LlavaTrainer
from llava.train.zero3 import prepare_for_forward

Fitted = tuple[Router, dict[str, Any]]


def make_plan_router(routing_args: PlanArguments, num_layers: int) -> Router:
    """Give a router of the kind that the flags name, still to be fitted; it skips nothing.

    Args:
        routing_args: ``router`` and ``rule_base`` are read.
        num_layers: Layers of the decoder, L.
    """
    name = routing_args.router or DEFAULT_PLAN_ROUTER
    if name == "static":
        return StaticRouter(num_layers, range(1, num_layers))
    if name == "random":
        return RandomRouter(num_layers)
    kind = {"fuzzy": FuzzyRouter, "linear_score": LinearScoreRouter}[name]
    return kind(load_rule_base(routing_args.rule_base or DEFAULT_RULE_BASE), num_layers)


def attach_new_router(model: Any, routing_args: RoutedArguments) -> None:
    """Attach the router that a stage trains or fits, with new adapters, to a dense model."""
    config, width = model.config.text_config, routing_args.adapter_hidden_dim or DEFAULT_ADAPTER_WIDTH
    if isinstance(routing_args, PlanArguments):
        attach_routing(model, make_plan_router(routing_args, config.num_hidden_layers), width)
    elif isinstance(routing_args, RoEArguments):
        router = LinearRouter(
            config.num_hidden_layers,
            config.hidden_size,
            routing_args.routing_summary or DEFAULT_SUMMARY,
            PRESETS[routing_args.roe_compat or DEFAULT_COMPAT],
        )
        attach_routing(model, router, width, "zero" if routing_args.freeze_adapters else "xavier")


def refit(
    trainer: LlavaTrainer,
    routing_args: PlanArguments | RoEArguments,
    checkpoint: Checkpoint,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure on all ranks, fit the router, put it in place.

    Args:
        trainer: Gives the engine, the training samples and the seed.
        routing_args: How much is measured, and the skip rate to set.
        checkpoint: Has the router.
        say: Called with lines of progress, on every rank.

    Returns:
        What was found, with its cost: training samples touched, sample-passes through the decoder, seconds of wall
        time and of this process's CPU time.
    """
    started, cpu_started = time.time(), time.process_time()
    engine, decoder = prepare_for_forward(trainer), find_decoder(checkpoint.model)
    num_layers = checkpoint.model.config.text_config.num_hidden_layers
    batch_size, highest, per_layer = routing_args.calibration_batch_size, routing_args.max_skip_ratio, False
    if isinstance(routing_args, PlanArguments):
        per_layer = routing_args.per_layer_tables or isinstance(decoder.router, PerLayerFuzzyRouter)
        samples = (routing_args.order_samples, routing_args.calibration_samples, routing_args.score_samples)
        size = CalibrationSize(*samples, batch_size, highest, per_layer)
    else:
        size = CalibrationSize(0, 0, 0, batch_size, highest, budget_samples=routing_args.budget_samples)
    image_token = get_image_token_id(checkpoint.model.config)
    dataset, device = trainer.train_dataset, trainer.args.device
    measurer = Measurer(
        engine, dataset, trainer.data_collator, image_token, num_layers, size, device, trainer.args.seed, say
    )
    if per_layer:
        router, report = _fit_rules(calibrate_layers, decoder.router, measurer, routing_args)
    elif isinstance(decoder.router, FuzzyRouter):
        router, report = _fit_score(decoder.router, measurer, routing_args)
    elif isinstance(decoder.router, StaticRouter):
        router, report = _fit_order(measurer, routing_args)
    elif isinstance(decoder.router, LinearRouter):
        router, report = _fit_skip_logit_biases(decoder.router, measurer, routing_args)
    else:
        router, report = decoder.router, {}
        router.set_skip_rate(routing_args.target_skip_ratio)
    decoder.router = router.to(device)
    return {
        **report,
        "samples": measurer.cost.samples,
        "passes": measurer.cost.passes,
        "seconds": time.time() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def _fit_score(router: FuzzyRouter, measurer: Measurer, routing_args: RoutedArguments) -> Fitted:
    measured = measurer.measure()
    return calibrate_router(
        router.rule_base, measured, measurer.num_layers, routing_args.target_skip_ratio, router_class=type(router)
    )


def _fit_rules(fit: Callable, router: FuzzyRouter, measurer: Measurer, routing_args: RoutedArguments) -> Fitted:
    return fit(router.rule_base, measurer.measure(), measurer.num_layers, routing_args.target_skip_ratio)


def _fit_order(measurer: Measurer, routing_args: RoutedArguments) -> Fitted:
    order = measurer.find_order()
    router = StaticRouter(measurer.num_layers, order, routing_args.target_skip_ratio, "greedy by answer loss")
    return router, {"layer_order": order, "skip_rate": routing_args.target_skip_ratio}


def _fit_skip_logit_biases(router: LinearRouter, measurer: Measurer, routing_args: RoEArguments) -> Fitted:
    """A table of budgets beside the operating point that the router was trained for, which stays the default."""
    batches = list(measurer.batches(routing_args.budget_samples))
    table = search_skip_logit_biases(lambda bias: measurer.skip_rate(batches, bias), routing_args.max_skip_ratio)
    router.set_bias_table(table)
    return router, {"budgets": table}
