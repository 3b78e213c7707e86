"""Task-complexity features: the rules' antecedents, known before the first decoder layer or after the prefill.

Positions of an image and of each question are pooled once (``summarise``); every feature is a function of the pooled
states, or of the pixels. All are computed in float32, per example, from nothing but that example, and lie in [0, 1].
How a raw feature fills that range is left to calibration (``calibrate.feature_range``), as some vary by little. Only
features that a rule base names are computed; ``docs/rules.md`` says what each costs and which way it should act.

Pixels come as a CLIP image processor gives them, with a standard deviation of about 1, so full contrast between
neighbours is about 4. The two statistics of pixels grow with the amount of detail. Each is a handful of elementwise
passes over one grey image: at 336 x 336 pixels about a millionth of the vision tower's arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzzyroe.routing_state import RoutingState

MAX_QUESTION_LENGTH = 512
"""Questions of this many tokens or more have length 1."""

EDGE_STEP = 0.4
"""A brightness step of a tenth of full contrast counts as a whole edge, a smaller one in proportion."""

CODING_STEP = 0.05
"""Differences are coded in steps of this size, about three of an eight-bit image's 256."""

FULL_CONTRAST = 4.0


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
    """Pool the states of images and questions, in float32.

    Args:
        hidden_states: States before the first decoder layer, (B, N, D).
        routing: Says where images and questions are.
        num_turns: Turns T to summarise; None reads it from the turn ids (one device transfer).
    """
    states = hidden_states.float()
    if num_turns is None:
        num_turns = max(int(routing.turn_ids.max()), 1)
    question = routing.question_mask.unsqueeze(1)  # (B, 1, N)
    if num_turns > 1:
        turns = torch.arange(1, num_turns + 1, device=states.device).view(1, -1, 1)
        question = question & (routing.turn_ids.unsqueeze(1) == turns)  # (B, T, N)
    # image and questions are pooled by one matrix product, since all states pass through the memory for each
    members = torch.cat([routing.image_mask.unsqueeze(1), question], dim=1).float()  # (B, 1 + T, N)
    counts = members.sum(dim=-1)  # (B, 1 + T)
    members = members / counts.clamp(min=1).unsqueeze(-1)
    pooled = weighted_sums(members, torch.cat([states, F.normalize(states, dim=-1)], dim=-1))  # (B, 1 + T, 2D)
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


def weighted_sums(weights: Tensor, states: Tensor) -> Tensor:
    """Multiply (B, M, N) and (B, N, D) to (B, M, D), in full float32 on a GPU too, whatever its TF32 flags say.

    In TF32, scores moved by up to 4e-4 and one plan in nine changed; training turns TF32 on, inference does not.
    """
    if not states.is_cuda:
        return weights @ states
    # products and sums of elements know no flag, and M is small
    return torch.stack([(row.unsqueeze(-1) * states).sum(dim=1) for row in weights.unbind(dim=1)], dim=1)


def image_entropy(summary: Summary) -> Tensor:
    """Entropy of the softmax over the coordinates of the mean image state, divided by log D (FuzzyRoE, batch-free)."""
    return _in_every_turn(_entropy(summary.image_mean).unsqueeze(1) * summary.has_image, summary)


def text_entropy(summary: Summary) -> Tensor:
    """Entropy of the softmax over the coordinates of the mean question state, divided by log D (FuzzyRoE)."""
    return _entropy(summary.text_mean)


def cross_modal_similarity(summary: Summary) -> Tensor:
    """``(1 + cosine) / 2`` of mean image and mean question state (FuzzyRoE, mapped to [0, 1]); 0 without an image."""
    cosine = F.cosine_similarity(summary.image_mean.unsqueeze(1), summary.text_mean, dim=-1)
    return ((1 + cosine) / 2 * summary.has_image).clamp(0, 1)


def image_dispersion(summary: Summary) -> Tensor:
    """``1 - |mean of unit states|`` over image positions: 0 if all point one way, near 1 if they scatter."""
    return _in_every_turn(_dispersion(summary.image_direction).unsqueeze(1) * summary.has_image, summary)


def text_dispersion(summary: Summary) -> Tensor:
    """``1 - |mean of unit states|`` over the positions of a question."""
    return _dispersion(summary.text_direction)


def question_length(summary: Summary) -> Tensor:
    """``log(1 + tokens) / log(1 + 512)``, at most 1."""
    return (torch.log1p(summary.question_length) / math.log1p(MAX_QUESTION_LENGTH)).clamp(max=1)


def edge_density(summary: Summary) -> Tensor:
    """Share of pixels on an edge, mean over the images of a row (``edge_share``)."""
    return _mean_over_images(summary, edge_share)


def coding_cost(summary: Summary) -> Tensor:
    """How badly the images compress, mean over those of a row (``code_length``)."""
    return _mean_over_images(summary, code_length)


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


def compute_features(summary: Summary, names: Sequence[str]) -> Tensor:
    """Compute raw features in [0, 1], (B, T, K), in the order of their names.

    Raises:
        KeyError: If a name is unknown; the message lists the known ones.
    """
    for name in names:
        if name not in FEATURES:
            raise KeyError(f"Feature '{name}' is unknown; a rule base may use {', '.join(FEATURES)}.")
    return torch.stack([FEATURES[name](summary) for name in names], dim=-1)


@dataclass(frozen=True)
class Answer:
    """What the prefill says of the first token of each answer.

    Attributes:
        margin: Log-probability of the likeliest token less that of the next, (B,).
        entropy: Entropy of all tokens over the logarithm of their number, (B,).
    """

    margin: Tensor
    entropy: Tensor


def read_answer(logits: Tensor) -> Answer:
    """Read the logits behind the last position of each prompt, (B, V)."""
    best = logits.float().topk(2, dim=-1).values
    return Answer(best[:, 0] - best[:, 1], _entropy(logits.float()))


def answer_margin(answer: Answer) -> Tensor:
    """``m / (1 + m)`` of the margin m between the two likeliest first tokens: 0 if they tie, towards 1 if one is sure.

    Reference:
        The confidence of CALM (arXiv:2207.07061), spread over [0, 1] by a map that keeps the order.
    """
    return answer.margin / (1 + answer.margin)


def answer_entropy(answer: Answer) -> Tensor:
    """Entropy of the first token over the logarithm of the vocabulary: 0 if it is sure, 1 if nothing is known."""
    return answer.entropy


ANSWER_FEATURES: dict[str, Callable[[Answer], Tensor]] = {
    function.__name__: function for function in (answer_margin, answer_entropy)
}
"""Features by name that are known after the prefill, values in [0, 1], (B,); antecedents of rules that escalate."""


def when_known(name: str) -> str:
    """Say when a feature is known: rules can only read what is known when they decide.

    >>> when_known("question_length"), when_known("answer_margin")
    ('before the first layer', 'after the prefill')

    Raises:
        KeyError: If there is no such feature.
    """
    if name not in {**FEATURES, **ANSWER_FEATURES}:
        raise KeyError(f"Feature '{name}' is unknown; known are {', '.join([*FEATURES, *ANSWER_FEATURES])}.")
    return "before the first layer" if name in FEATURES else "after the prefill"


def edge_share(pixel_values: Tensor) -> Tensor:
    """Mean over pixels of ``min(1, |gradient| / EDGE_STEP)``: the share of pixels on an edge, soft at weak edges.

    Of normalised images, (images, channels, H, W); in [0, 1], (images,), nan for an image with a non-finite pixel.
    """
    across, down = _pixel_differences(pixel_values)
    gradient = (across[:, :-1].square() + down[:, :, :-1].square()).sqrt()  # (images, H - 1, W - 1)
    return (gradient / EDGE_STEP).clamp(max=1).mean(dim=(1, 2))


def code_length(pixel_values: Tensor) -> Tensor:
    """Mean length of a code for each pixel's difference to its left neighbour: how badly the image compresses.

    A difference d costs ``log(1 + |d| / CODING_STEP)``, as lengths of universal codes do; the mean is divided by the
    cost of ``FULL_CONTRAST``. PNG predicts pixels in the same manner before it compresses. Shapes as in ``edge_share``.
    """
    across, _ = _pixel_differences(pixel_values)
    cost = torch.log1p(across.abs() / CODING_STEP).mean(dim=(1, 2))
    return (cost / math.log1p(FULL_CONTRAST / CODING_STEP)).clamp(max=1)


def mean_over_images(values: Tensor, image_tokens: Tensor) -> Tensor:
    """Average a statistic, (images,), over the images of each row, (B,); 0 for a row without an image.

    Images stand in the order of the rows and take equally many positions each, so the image positions of each row,
    (B,), say whose they are.
    """
    ends = image_tokens.cumsum(0)  # (B,)
    tokens_per_image = ends[-1] / len(values)
    middles = (torch.arange(len(values), device=values.device) + 0.5) * tokens_per_image  # (images,)
    is_own = (middles >= (ends - image_tokens).unsqueeze(1)) & (middles < ends.unsqueeze(1))  # (B, images)
    sums = torch.where(is_own, values, 0.0).sum(dim=1)  # no product: nan of one row stays out of the others
    return sums / is_own.sum(dim=1).clamp(min=1)


def _pixel_differences(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of grey values to the left and the upper neighbour, (images, H, W - 1) and (images, H - 1, W)."""
    grey = pixel_values.float().mean(dim=1)
    grey = torch.where(torch.isfinite(grey), grey, torch.nan)  # an infinite pixel must not be cut to a large one
    return grey.diff(dim=2), grey.diff(dim=1)


def _mean_over_images(summary: Summary, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic of the pixels for every turn, (B, T); 0 where there is no image or its pixels are unknown."""
    if summary.pixel_values is None:
        return torch.zeros_like(summary.question_length)
    # a processor may give (B, images, channels, H, W)
    values = statistic(summary.pixel_values.flatten(0, -4)).to(summary.image_length.device)
    return _in_every_turn(mean_over_images(values, summary.image_length).unsqueeze(1), summary)


def _in_every_turn(values: Tensor, summary: Summary) -> Tensor:
    """Repeat what is known of an image, (B, 1), for every turn, (B, T)."""
    return values.expand_as(summary.question_length)


def _entropy(states: Tensor) -> Tensor:
    log_probabilities = states.log_softmax(dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return (entropy / math.log(states.shape[-1])).clamp(0, 1)  # rounding passes the ends of the range


def _dispersion(directions: Tensor) -> Tensor:
    return (1 - directions.norm(dim=-1)).clamp(0, 1)
