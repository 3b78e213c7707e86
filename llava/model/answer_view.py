"""What callers see of a generation in LLaVA's convention: answers, without the prompts before them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


class AnswerCriterion(StoppingCriteria):
    """A stopping criterion that is shown the answers alone.

    Args:
        criterion: Called with ids of answers, (B, answer), and scores.
        prompt_length: Positions of the prompts.
    """

    def __init__(self, criterion: Any, prompt_length: int) -> None:
        self.criterion, self.prompt_length = criterion, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        """What the criterion says of the answers."""
        return self.criterion(input_ids[:, self.prompt_length :], scores, **kwargs)


class AnswerProcessor(LogitsProcessor):
    """A logits processor that is shown the answers alone.

    Args:
        processor: Called with ids of answers, (B, answer), and scores, (B, vocabulary).
        prompt_length: Positions of the prompts.
    """

    def __init__(self, processor: Any, prompt_length: int) -> None:
        self.processor, self.prompt_length = processor, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as the processor changes them."""
        return self.processor(input_ids[:, self.prompt_length :], scores)


def show_answers_only(options: dict[str, Any], prompt_length: int) -> dict[str, Any]:
    """Options of ``generate`` whose own stopping criteria and logits processors see answers only."""
    wrapped = dict(options)
    for name, wrapper, kind in (
        ("stopping_criteria", AnswerCriterion, StoppingCriteriaList),
        ("logits_processor", AnswerProcessor, LogitsProcessorList),
    ):
        items: Iterable | None = wrapped.get(name)
        if items is not None:
            wrapped[name] = kind([wrapper(item, prompt_length) for item in items])
    return wrapped


def drop_prompts(output: Any, prompt_length: int) -> Any:
    """The answers of what ``generate`` gave: a tensor (B, N), or an output with ``sequences`` (B, N)."""
    if isinstance(output, Tensor):
        return output[:, prompt_length:]
    output.sequences = output.sequences[:, prompt_length:]
    return output
