"""Explanation of the layers that a routed model skips for one question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fuzzyroe import set_skip_rate
from fuzzyroe.attach import find_router
from fuzzyroe.features import compute_features
from fuzzyroe.routers import ROUTERS
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.rules.explain import Explanation, explain_features
from llava.conversation import get_template
from llava.data.images import open_rgb
from llava.inference.generator import GenerationOptions, Generator, make_message
from llava.model.builder import Checkpoint
from llava.model.families import choose_template, get_image_token_id
from llava.model.token_pruning import embed_prompts


@dataclass(frozen=True)
class QuestionExplanation:
    """The decisions of routing between a question and its answer."""

    rules: Explanation  # terms, fired rules and score that follow from the features
    raw_features: dict[str, float]  # before calibration scales them to [0, 1], by name
    percentile: float  # share of calibration questions with a lower score, in [0, 1]
    target_skip_ratio: float  # mean skip rate that was asked for
    thresholds: tuple[float, ...]  # percentile below which each layer is skipped, (L,)
    kept: tuple[int, ...]  # layers that ran
    skipped: tuple[int, ...]  # layers that an adapter stood in for
    answer: str


@torch.no_grad()
def explain_question(
    checkpoint: Checkpoint,
    question: str,
    image: str | Path | None = None,
    template: str | None = None,
    skip_rate: float | None = None,
    max_rules: int = 5,
    max_new_tokens: int = 64,
) -> QuestionExplanation:
    """Answer a question and explain how the fuzzy router came to its decisions.

    Args:
        checkpoint: A routed checkpoint.
        question: The question; an image tag in it is the place of the image, which else comes first.
        image: Image file; None for a question without one.
        template: Name of a conversation template; None takes the one that the checkpoint was trained with.
        skip_rate: Target skip rate; None for the checkpoint's own.
        max_rules: Most fired rules to list.
        max_new_tokens: Longest answer.

    Raises:
        ValueError: If the checkpoint is not routed by fuzzy rules or was not calibrated for the skip rate, or the
            question has an image tag without an image.
        KeyError: If the template is unknown.
    """
    model: Any = checkpoint.model.eval()
    router = find_router(model)
    # a router made from the fuzzy one may have a score per layer, without a percentile
    is_fuzzy = type(router) is ROUTERS["fuzzy"]
    if not is_fuzzy:
        described = "is dense" if router is None else f"is routed by a {type(router).__name__}"
        raise ValueError(
            f"{checkpoint.path} {described}; only fuzzy rules can be explained. Pass the output folder of a router, "
            "adapter or finetune stage."
        )
    set_skip_rate(model, float(router.target_skip_ratio) if skip_rate is None else skip_rate)
    message = make_message(question, [] if image is None else [open_rgb(image)])
    generator = Generator(checkpoint, get_template(choose_template(template, model.config, "--version")[0]))
    # the router alone, before the first layer, shows how the score comes about; the answer is routed the same way
    inputs = generator.encode([message])
    routing = RoutingState.from_batch(inputs, get_image_token_id(model.config))
    router.plan(embed_prompts(model.model, inputs["input_ids"], inputs.get("pixel_values"), routing), routing)
    result: Any = routing.result
    raw_features = compute_features(result.summary, router.antecedents)[0, 0].tolist()
    rule_base = router.rule_base if router.rule_base.is_complete else router.rule_base.interpolate()
    batch = generator.generate([message], GenerationOptions(max_new_tokens=max_new_tokens))
    keeps = batch.kept_layers[0].tolist()
    return QuestionExplanation(
        rules=explain_features(rule_base, result.features[0, 0].tolist(), max_rules),
        raw_features=dict(zip(router.antecedents, raw_features, strict=True)),
        percentile=float(router.percentiles(result.scores)[0, 0]),
        target_skip_ratio=float(router.target_skip_ratio),
        thresholds=tuple(router.thresholds().tolist()),
        kept=tuple(layer for layer, keep in enumerate(keeps) if keep),
        skipped=tuple(layer for layer, keep in enumerate(keeps) if not keep),
        answer=batch.texts[0],
    )
