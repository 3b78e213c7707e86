"""Training objectives: the losses that a stage can minimise, each a function of model, batch and routing.

An objective has the signature ``objective(model, batch, routing, **options)`` and one line in ``OBJECTIVES``. It runs
the model itself and gives the loss, a mean over the batch, or the loss with values to log. Its keyword-only parameters
are filled from the training flags of the same name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fuzzyroe.attach import find_decoder, find_decoder_layers
from fuzzyroe.routers.roe.training import routing_objective
from fuzzyroe.routing_state import RoutingState
from llava.train.stages import StageInputError

Loss = Tensor | tuple[Tensor, dict[str, Tensor]]
"""A scalar; or a scalar with values of each sample, (B,), whose means are logged under their names."""

Objective = Callable[[nn.Module, dict[str, Any], RoutingState | None], Loss]
"""What the trainer calls with the model (or the engine around it), what the model takes (with ``labels``), routing."""


def run_model(model: nn.Module, batch: dict[str, Any], routing: RoutingState | None) -> Any:
    """Run a model on a batch, routed if there is routing; its keep weights are in ``routing.result`` afterwards."""
    return model(**batch) if routing is None else model(**batch, routing=routing)


def language_model(model: nn.Module, batch: dict[str, Any], routing: RoutingState | None) -> Tensor:
    """Mean next-token loss of the answers, as the model computes it."""
    return run_model(model, batch, routing).loss


def roe(
    model: nn.Module, batch: dict[str, Any], routing: RoutingState, *, target_skip_ratio: float, skip_loss_weight: float
) -> Loss:
    """RoE's objective: next-token loss and a hinge on the skip rate, see ``fuzzyroe.routers.roe.training``.

    Args:
        model, batch, routing: Model with linear routers; its input with ``labels``, (B, N); relaxed routing of it.
        target_skip_ratio: Target skip ratio, in [0, 0.5].
        skip_loss_weight: Weight of the hinge, 1 in RoE; 0 trains without this regularisation.
    """
    labels = batch["labels"]
    # Without labels the model computes no loss of its own: RoE's mean is over samples, not over tokens.
    logits = run_model(model, {name: value for name, value in batch.items() if name != "labels"}, routing).logits
    router: Any = find_decoder(_unwrap(model)).router
    keep_weights: Any = routing.result.keep_weights  # set by now: the forward pass has asked the router
    turns, damping = routing.turn_mask(), router.compat.damping
    parts = routing_objective(logits, labels, keep_weights, turns, target_skip_ratio, damping, skip_loss_weight)
    return parts.loss, {"routing/task_loss": parts.task, "routing/hinge": parts.hinge}


def layer_regression(model: nn.Module, batch: dict[str, Any], routing: RoutingState | None) -> Tensor:
    """Regression of each adapter on what its layer gives, on the states of the dense model, without answers.

    For a layer with input h and output y, over the positions that are no padding::

        sum |h + adapter(input_layernorm(h)) - y|^2  /  sum |h - y|^2

    An untrained adapter, which is zero, has loss 1, one that stands in for its layer perfectly 0. The loss is the mean
    over layers. Every layer teaches its adapter in every step, and no error of one adapter reaches the next; the model
    is run once, without a gradient. ``routing`` is not read, as nothing is skipped.

    Reference:
        Informed Routing (arXiv:2510.13831), lightweight feature forecasters.
    """
    mask, losses = batch["attention_mask"].bool(), []

    def compare(layer: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        hidden = (args[0] if args else kwargs["hidden_states"]).detach()
        with torch.enable_grad():
            predicted = layer.skip_output(hidden)  # (B, N, D)
            error, change = (((state - output)[mask].float() ** 2).sum() for state in (predicted, hidden))
            losses.append(error / change.clamp(min=torch.finfo(torch.float32).tiny))

    layers = find_decoder_layers(_unwrap(model))
    handles = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(losses).mean()


OBJECTIVES: dict[str, Callable[..., Loss]] = {
    "language_model": language_model,
    "roe": roe,
    "layer_regression": layer_regression,
}
"""Every objective by its name."""


def make_objective(name: str, flags: Any) -> Objective:
    """Look an objective up and fill its options from training flags.

    Args:
        name: A key of ``OBJECTIVES``.
        flags: Has an attribute for each keyword-only parameter of the objective.

    Raises:
        StageInputError: If the stage has not the flags that the objective reads.
    """
    function = OBJECTIVES[name]  # the flag's own dataclass refuses other names
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    missing = [option for option in names if not hasattr(flags, option)]
    if missing:
        raise StageInputError(
            f"--objective {name} was given, but it reads --{missing[0]}, which this stage does not have; leave it out, "
            "or use a stage of another family."
        )
    options = {option: getattr(flags, option) for option in names}
    return functools.partial(function, **options) if options else function


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside an engine or a wrapper for several processes."""
    return getattr(model, "module", model)
