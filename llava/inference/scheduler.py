"""Scheduler: a queue of messages is planned first, then batched with those whose plans nearly agree.

In decoding a layer's weights are read once for the whole batch, so a layer is saved only if every row skips it; in
prefill every row saves its own layers, but is padded to the longest. The choice of batches therefore decides how much
of the skips is saved, and nothing else: every row is still routed by its own plan, so no answer depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.inference.generator import GeneratedBatch, GenerationOptions, Generator, Message
from llava.model.prefill_plans import PlannedPrompt, plans_ahead

SCHEDULES = ("plan", "arrival")
"""Orders of a queue: by plan and length, or as it comes."""

EXPECTED_TOKENS = 64
"""Longest answer that the scheduler expects: most answers end long before ``max_new_tokens``."""

RATE_STEPS = 1000
"""Layers that a skip rate is spread over where a plan is given as a rate."""


def answer_all(
    generator: Generator,
    messages: Sequence[Message],
    options: GenerationOptions,
    batch_size: int = 8,
    schedule: str = "plan",
) -> list[str]:
    """Answer messages, and give the answers in the order of the messages; see ``answer_queue``."""
    answers = [""] * len(messages)
    for batch, output in answer_queue(generator, messages, options, batch_size, schedule):
        for index, text in zip(batch, output.texts, strict=True):
            answers[index] = text
    return answers


def answer_queue(
    generator: Generator,
    messages: Sequence[Message],
    options: GenerationOptions,
    batch_size: int,
    schedule: str = "plan",
) -> Iterator[tuple[list[int], GeneratedBatch]]:
    """Answer messages batch by batch; no answer depends on its batch.

    With the schedule ``"plan"``, vision tower, projector and router run over the whole queue first. Their results are
    kept until the prompt is answered (one state of the decoder's width per position), so that nothing runs twice.
    Where the router does not plan ahead, or every batch is a single message, the queue is answered as it comes.

    Args:
        generator: The checkpoint.
        messages: The queue.
        options: Options of generation.
        batch_size: Messages per batch, at least 1.
        schedule: A name in ``SCHEDULES``.

    Yields:
        Indices of the messages of a batch, and their answers.

    Raises:
        ValueError: If the schedule is unknown or the batch size is below 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"Schedule '{schedule}' is unknown; use one of {', '.join(SCHEDULES)}.")
    _check_batch_size(batch_size)
    arrival = [list(range(len(messages)))[start : start + batch_size] for start in range(0, len(messages), batch_size)]
    if schedule == "arrival" or batch_size == 1 or len(arrival) < 2 or not plans_ahead(generator.model):
        for batch in arrival:
            yield batch, generator.generate([messages[index] for index in batch], options)
        return
    waiting: dict[int, tuple[PlannedPrompt, float]] = {}  # index -> prompt, and its share of the time of planning
    for batch in arrival:
        planned, milliseconds = generator.plan([messages[index] for index in batch])
        per_position = milliseconds / sum(len(prompt.states) for prompt in planned)
        waiting |= {i: (p, per_position * len(p.states)) for i, p in zip(batch, planned, strict=True)}
    plans = torch.stack([prompt.keep for prompt, _ in waiting.values()])
    lengths = [len(prompt.states) for prompt, _ in waiting.values()]
    work = WorkModel(new_tokens=min(options.max_new_tokens, EXPECTED_TOKENS))
    for batch in form_batches(plans, lengths, batch_size, work):
        # popped, so that the states of answered prompts leave memory
        prompts, shares = zip(*(waiting.pop(index) for index in batch), strict=True)
        yield batch, generator.generate_planned(prompts, options, sum(shares))


@dataclass(frozen=True)
class WorkModel:
    """Cost of a batch, counted in positions that pass through one layer.

    Attributes:
        new_tokens: Tokens that a request is expected to be answered with, at least 1.
        positions_per_read: Positions that a layer computes in the time in which its weights are read: the ratio of
            arithmetic to memory bandwidth, about 10 on a CPU core in float32 and 150 on a data-centre GPU in bfloat16.
    """

    new_tokens: int = 16
    positions_per_read: float = 32.0

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.positions_per_read < 0:
            raise ValueError(
                f"WorkModel got new_tokens={self.new_tokens} and positions_per_read={self.positions_per_read}; answers "
                "have at least 1 token, and the ratio is not negative. Correct them."
            )

    def work(self, plans: Tensor, lengths: Tensor) -> float:
        """Estimate the work of one batch.

        Every row pays for the longest prompt in the layers it keeps; each step of decoding pays for reading the layers
        that any row keeps, and for the rows that run them.

        Args:
            plans: True where the request runs the layer, (B, L) bool.
            lengths: Positions of each prompt, (B,) int64.
        """
        kept, read = int(plans.sum()), int(plans.any(dim=0).sum())
        decode = max(self.new_tokens - 1, 0) * (read * self.positions_per_read + kept)
        return float(int(lengths.max()) * kept + decode)


def form_batches(
    plans: Tensor, lengths: Sequence[int], batch_size: int, model: WorkModel | None = None
) -> list[list[int]]:
    """Order a queue by planned skip rate and cut it into batches.

    The queue is cut into 1, 2, 4, ... groups of similar prompt length, and each group is ordered by the layers that its
    requests keep, the most first; of these orders the one of least work is taken. Nested plans that keep equally many
    layers are equal, so neighbours differ by few.

    Args:
        plans: True where the request runs the layer, (n, L) bool; or planned skip rates, (n,), for plans that are
            nested, where only the number of layers matters.
        lengths: Positions of each prompt, images included, n of them.
        batch_size: Requests per batch, at least 1; the last batches may have fewer.
        model: Cost of a batch; None takes the defaults.

    Returns:
        Indices of the requests of each batch; each request is in one.

    Raises:
        ValueError: If the sizes do not fit.

    Example:
        >>> plans = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]).bool()
        >>> form_batches(plans, [9, 9, 9, 9], batch_size=2)
        [[0, 2], [1, 3]]
    """
    _check_batch_size(batch_size)
    plans = plans.detach().cpu()
    if plans.dim() == 1:  # skip rates, to a thousandth, stand for nested plans
        plans = torch.arange(RATE_STEPS) >= (plans.double().clamp(0, 1) * RATE_STEPS).round().unsqueeze(1)
    if plans.dim() != 2 or len(plans) != len(lengths):
        raise ValueError(
            f"plans is {tuple(plans.shape)} for {len(lengths)} prompts; give one row of layers, or one skip rate, for "
            "each prompt."
        )
    if any(length < 1 for length in lengths):
        raise ValueError(f"The shortest prompt has {min(lengths)} positions; a prompt has at least 1. Drop empty ones.")
    work_model, sizes = model or WorkModel(), torch.tensor(list(lengths), dtype=torch.long)
    candidates, num_groups = [], 1
    # more groups than full batches would leave nothing to order by plan
    while num_groups == 1 or num_groups * batch_size <= len(sizes):
        candidates.append(_cut(plans, sizes, batch_size, num_groups))
        num_groups *= 2
    return min(candidates, key=lambda batches: sum(work_model.work(plans[batch], sizes[batch]) for batch in batches))


def _cut(plans: Tensor, lengths: Tensor, batch_size: int, num_groups: int) -> list[list[int]]:
    """Cut a queue into groups of similar length, and each into batches in the order of plans, then of lengths."""
    by_length = sorted(range(len(lengths)), key=lambda index: (-int(lengths[index]), index))
    # groups are whole numbers of batches, so that only the last batch of all is smaller
    num_batches = -(-len(by_length) // batch_size)
    patterns = [tuple(row) for row in plans.tolist()]
    batches = []
    for group in range(num_groups):
        first, last = (num_batches * number // num_groups * batch_size for number in (group, group + 1))
        ordered = sorted(
            by_length[first:last],
            key=lambda index: (sum(patterns[index]), patterns[index], int(lengths[index])),
            reverse=True,
        )
        batches += [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return batches


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 message. Give a number from 1.")
