"""Answering a queue of messages: planned first, then batched with those whose plans nearly agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fuzzyroe.batching import WorkModel, form_batches
from llava.eval.generation import GeneratedBatch, Generator, Message
from llava.eval.generation_options import GenerationOptions
from llava.model.planned_prompts import plans_ahead

SCHEDULES = ("plan", "arrival")
"""How a queue is batched: by plan and length, or as it comes."""

EXPECTED_TOKENS = 64
"""Length of an answer that the scheduler reckons with at most: most answers end long before ``max_new_tokens``."""


def answer_queue(
    generator: Generator,
    messages: Sequence[Message],
    options: GenerationOptions,
    batch_size: int,
    schedule: str = "plan",
) -> Iterator[tuple[list[int], GeneratedBatch]]:
    """Answer messages batch by batch; no answer depends on which batch it is in.

    With the schedule ``"plan"``, vision tower, projector and router run over the whole queue first, and what they gave
    is kept until its prompt is answered (one state of the decoder's width per position), so that nothing runs twice.
    Where the router does not plan ahead, or every batch is a single message, the queue is answered as it comes.

    Args:
        generator: The checkpoint.
        messages: The queue.
        options: How answers are generated.
        batch_size: Messages per batch, at least 1.
        schedule: A name in ``SCHEDULES``.

    Yields:
        Indices of the messages of a batch, and their answers.

    Raises:
        ValueError: If the schedule is unknown or the batch size is below 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"Schedule '{schedule}' is unknown; use one of {', '.join(SCHEDULES)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least 1 message. Give a number from 1.")
    arrival = [list(range(len(messages)))[start : start + batch_size] for start in range(0, len(messages), batch_size)]
    if schedule == "arrival" or batch_size == 1 or len(arrival) < 2 or not plans_ahead(generator.model):
        for batch in arrival:
            yield batch, generator.generate([messages[index] for index in batch], options)
        return
    prompts, shares = [], []
    for batch in arrival:
        planned, milliseconds = generator.plan([messages[index] for index in batch])
        positions = sum(len(prompt.states) for prompt in planned)
        prompts += planned
        shares += [milliseconds * len(prompt.states) / positions for prompt in planned]
    plans, lengths = torch.stack([prompt.keep for prompt in prompts]), [len(prompt.states) for prompt in prompts]
    work = WorkModel(new_tokens=min(options.max_new_tokens, EXPECTED_TOKENS))
    for batch in form_batches(plans, lengths, batch_size, work):
        chosen = [prompts[index] for index in batch]
        yield batch, generator.generate_planned(chosen, options, sum(shares[index] for index in batch))
        for index in batch:  # let go of the states
            prompts[index] = None


def answer_all(
    generator: Generator,
    messages: Sequence[Message],
    options: GenerationOptions,
    batch_size: int = 8,
    schedule: str = "plan",
) -> list[str]:
    """Give the answers to messages, in their order; see ``answer_queue``."""
    answers = [""] * len(messages)
    for batch, output in answer_queue(generator, messages, options, batch_size, schedule):
        for index, text in zip(batch, output.texts, strict=True):
            answers[index] = text
    return answers
