"""Task-complexity features: what the rules know of an example before the first decoder layer runs.

Positions of an image and of each question are pooled once (``summarise``); every feature is a function of the pooled
states, or of the pixels. All are computed in float32, per example, from nothing but that example, and lie in [0, 1].
How a raw feature fills that range is left to calibration (``calibrate.feature_range``), as some vary by little. Only
features that a rule base names are computed; ``docs/rules.md`` says what each costs and which way it should act.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzzyroe import image_statistics
from fuzzyroe.routing_state import RoutingState

MAX_QUESTION_LENGTH = 512
"""Questions of this many tokens or more have length 1."""


@dataclass(frozen=True)
class Summary:
    """Pooled states of a batch.

    Attributes:
        image_mean: Mean state of the image positions, (B, D); zero without an image.
        image_direction: Mean of their unit-length states, (B, D); zero without an image.
        has_image: 1 where there is an image, (B, 1).
        text_mean: Mean state of each question, (B, T, D); zero for a turn an example does not have.
        text_direction: Mean of its unit-length states, (B, T, D).
        question_length: Tokens of each question, (B, T).
        image_length: Image positions of each row, or its images where these differ in length, (B,).
        pixel_values: Images of the batch in the order of its rows, (images, channels, H, W); None if unknown.
    """

    image_mean: Tensor
    image_direction: Tensor
    has_image: Tensor
    text_mean: Tensor
    text_direction: Tensor
    question_length: Tensor
    image_length: Tensor
    pixel_values: Tensor | None = None


def summarise(hidden_states: Tensor, routing: RoutingState, num_turns: int | None = None) -> Summary:
    """Pool the states of images and questions.

    Args:
        hidden_states: States before the first decoder layer, (B, N, D).
        routing: Says where images and questions are.
        num_turns: Turns T to summarise; None reads it from the turn ids (one device transfer).

    Returns:
        The pooled states, float32.
    """
    states = hidden_states.float()
    if num_turns is None:
        num_turns = max(int(routing.turn_ids.max()), 1)
    image = routing.image_mask.unsqueeze(1)  # (B, 1, N)
    if num_turns == 1:
        question = routing.question_mask.unsqueeze(1)
    else:
        turns = torch.arange(1, num_turns + 1, device=states.device).view(1, -1, 1)
        question = routing.question_mask.unsqueeze(1) & (routing.turn_ids.unsqueeze(1) == turns)  # (B, T, N)
    members = torch.cat([image, question], dim=1).float()  # (B, 1 + T, N)
    counts = members.sum(dim=-1)  # (B, 1 + T)
    members = members / counts.clamp(min=1).unsqueeze(-1)
    pooled = members @ torch.cat([states, F.normalize(states, dim=-1)], dim=-1)  # (B, 1 + T, 2D)
    mean, direction = pooled.chunk(2, dim=-1)
    return Summary(
        image_mean=mean[:, 0],
        image_direction=direction[:, 0],
        has_image=(counts[:, :1] > 0).float(),
        text_mean=mean[:, 1:],
        text_direction=direction[:, 1:],
        question_length=counts[:, 1:],
        image_length=counts[:, 0] if routing.images_per_row is None else routing.images_per_row,
        pixel_values=routing.pixel_values,
    )


def image_entropy(summary: Summary) -> Tensor:
    """Entropy of the softmax over the coordinates of the mean image state, divided by log D (FuzzyRoE, batch-free)."""
    return (_entropy(summary.image_mean).unsqueeze(1) * summary.has_image).expand_as(summary.question_length)


def text_entropy(summary: Summary) -> Tensor:
    """Entropy of the softmax over the coordinates of the mean question state, divided by log D (FuzzyRoE)."""
    return _entropy(summary.text_mean)


def cross_modal_similarity(summary: Summary) -> Tensor:
    """``(1 + cosine) / 2`` of mean image and mean question state (FuzzyRoE, mapped to [0, 1]); 0 without an image."""
    cosine = F.cosine_similarity(summary.image_mean.unsqueeze(1), summary.text_mean, dim=-1)
    return ((1 + cosine) / 2 * summary.has_image).clamp(0, 1)


def image_dispersion(summary: Summary) -> Tensor:
    """``1 - |mean of unit states|`` over image positions: 0 if all point one way, near 1 if they scatter."""
    dispersion = _dispersion(summary.image_direction).unsqueeze(1)
    return (dispersion * summary.has_image).expand_as(summary.question_length)


def text_dispersion(summary: Summary) -> Tensor:
    """``1 - |mean of unit states|`` over the positions of a question."""
    return _dispersion(summary.text_direction)


def question_length(summary: Summary) -> Tensor:
    """``log(1 + tokens) / log(1 + 512)``, at most 1."""
    return (torch.log1p(summary.question_length) / math.log1p(MAX_QUESTION_LENGTH)).clamp(max=1)


def edge_density(summary: Summary) -> Tensor:
    """Share of pixels on an edge, mean over the images of a row (``image_statistics.edge_density``)."""
    return _mean_statistic(summary, image_statistics.edge_density)


def coding_cost(summary: Summary) -> Tensor:
    """How badly the images compress, mean over those of a row (``image_statistics.coding_cost``)."""
    return _mean_statistic(summary, image_statistics.coding_cost)


def _mean_statistic(summary: Summary, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic of the pixels for every turn, (B, T); 0 where there is no image or its pixels are unknown."""
    if summary.pixel_values is None:
        return torch.zeros_like(summary.question_length)
    values = statistic(summary.pixel_values.flatten(0, -4)).to(summary.image_length.device)
    return (
        image_statistics.mean_over_images(values, summary.image_length).unsqueeze(1).expand_as(summary.question_length)
    )


def _entropy(states: Tensor) -> Tensor:
    log_probabilities = states.log_softmax(dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return (entropy / math.log(states.shape[-1])).clamp(0, 1)  # rounding passes the ends of the range


def _dispersion(directions: Tensor) -> Tensor:
    return (1 - directions.norm(dim=-1)).clamp(0, 1)


FEATURES: dict[str, Callable[[Summary], Tensor]] = {
    function.__name__: function
    for function in (
        image_entropy,
        text_entropy,
        cross_modal_similarity,
        image_dispersion,
        text_dispersion,
        question_length,
        edge_density,
        coding_cost,
    )
}
"""Features by name, each from a summary to values in [0, 1], (B, T); the names are antecedents in rule bases."""


def compute_features(summary: Summary, names: tuple[str, ...] | list[str]) -> Tensor:
    """Compute several features.

    Returns:
        Raw values in [0, 1], (B, T, K), in the order of ``names``.

    Raises:
        KeyError: If a name is unknown; the message lists the known ones.
    """
    for name in names:
        if name not in FEATURES:
            raise KeyError(f"Feature '{name}' is unknown; a rule base may use {', '.join(FEATURES)}.")
    return torch.stack([FEATURES[name](summary) for name in names], dim=-1)
