"""``fuzzyroe explain``: why a routed model skips the layers it skips for one question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from llava.eval.explain import QuestionExplanation


def explain_command(
    model: Annotated[str, typer.Option(help="Routed checkpoint.")],
    question: Annotated[str, typer.Option(help="The question, without an image tag.")],
    image: Annotated[Path | None, typer.Option(help="Image file.")] = None,
    version: Annotated[str, typer.Option(help="Conversation template of the checkpoint.")] = "v1",
    skip_rate: Annotated[
        float | None, typer.Option(help="Mean skip rate to plan for; the checkpoint's own if left out.", min=0, max=1)
    ] = None,
    rules: Annotated[int, typer.Option(help="Rules to list.", min=1)] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 64,
) -> None:
    """Answer one question and show features, rules, score and skipped layers."""
    from transformers.utils import logging

    from llava.cli.terminal import open_console
    from llava.eval.explain import explain_question
    from llava.model.builder import load_checkpoint

    logging.disable_progress_bar()
    checkpoint = load_checkpoint(model)
    explanation = explain_question(checkpoint, question, image, version, skip_rate, rules, max_new_tokens)
    _print_explanation(open_console(), explanation)


def _print_explanation(console: Console, explanation: QuestionExplanation) -> None:
    from llava.cli.terminal import make_table

    rules = explanation.rules
    features = [
        (name, rules.words[name], f"{value:.3f}", f"{explanation.raw_features[name]:.4f}")
        for name, value in rules.features.items()
    ]
    console.print(make_table("Features", ("feature", "in words", "scaled", "raw"), features, text_columns=2))
    fired = [
        (rule.text + (f"\n  {rule.comment}" if rule.comment else ""), rule.origin, f"{rule.strength:.3f}")
        for rule in rules.fired
    ]
    title = f"\nStrongest of {rules.num_fired} rules that fired"
    console.print(make_table(title, ("rule", "origin", "strength"), fired, text_columns=2))
    num_layers = len(explanation.thresholds)
    console.print(
        f"\nscore {rules.score:.3f}: higher than {explanation.percentile:.0%} of the calibration questions; mean skip "
        f"rate planned for: {explanation.target_skip_ratio:.0%}",
        soft_wrap=True,
    )
    console.print(
        f"layers kept {len(explanation.kept)} of {num_layers}, skipped {len(explanation.skipped)} "
        f"({len(explanation.skipped) / num_layers:.0%}): {', '.join(map(str, explanation.skipped)) or 'none'}",
        soft_wrap=True,
    )
    console.print(_layer_strip(explanation), soft_wrap=True)
    console.print(f"\nanswer: {explanation.answer}", markup=False, soft_wrap=True)


def _layer_strip(explanation: QuestionExplanation) -> Text:
    """All layers in order: numbers of kept ones, dots for skipped ones."""
    from rich.text import Text

    strip = Text()
    for layer in range(len(explanation.thresholds)):
        is_kept = layer in explanation.kept
        strip.append(f"{layer:>3}" if is_kept else "  ·", style="green" if is_kept else "dim")
    return strip
