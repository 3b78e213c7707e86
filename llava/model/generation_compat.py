"""Generation in LLaVA's convention: callers see answers, without the prompts before them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class AnswerCriterion(StoppingCriteria):
    """A stopping criterion that sees the answers alone.

    Args:
        criterion: Called with ids of answers, (B, answer), and scores.
        prompt_length: Positions of the prompts.
    """

    def __init__(self, criterion: Any, prompt_length: int) -> None:
        self.criterion, self.prompt_length = criterion, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        """Ask the criterion about the answers."""
        return self.criterion(input_ids[:, self.prompt_length :], scores, **kwargs)


class AnswerProcessor(LogitsProcessor):
    """A logits processor that sees the answers alone.

    Args:
        processor: Called with ids of answers, (B, answer), and scores, (B, vocabulary).
        prompt_length: Positions of the prompts.
    """

    def __init__(self, processor: Any, prompt_length: int) -> None:
        self.processor, self.prompt_length = processor, prompt_length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Give the scores as the processor changes them."""
        return self.processor(input_ids[:, self.prompt_length :], scores)


class AnswerStreamer(BaseStreamer):
    """A streamer that sees the answer alone.

    Args:
        streamer: Receives token ids, first the prompt's as (1, 0), then the answer's as they come.
        prompt_length: Positions of the prompt.
    """

    def __init__(self, streamer: Any, prompt_length: int) -> None:
        self.streamer, self.num_hidden = streamer, prompt_length

    def put(self, value: Tensor) -> None:
        """Pass token ids on, without those of the prompt, which come first."""
        self.streamer.put(value[..., self.num_hidden :])
        self.num_hidden = 0

    def end(self) -> None:
        """Say that the answer is complete."""
        self.streamer.end()


def show_answers_only(options: dict[str, Any], prompt_length: int) -> dict[str, Any]:
    """Wrap the stopping criteria, logits processors and streamer of ``generate`` so that they see answers only."""
    wrapped = dict(options)
    if wrapped.get("streamer") is not None:
        wrapped["streamer"] = AnswerStreamer(wrapped["streamer"], prompt_length)
    if wrapped.get("stopping_criteria") is not None:
        criteria = [AnswerCriterion(item, prompt_length) for item in wrapped["stopping_criteria"]]
        wrapped["stopping_criteria"] = StoppingCriteriaList(criteria)
    if wrapped.get("logits_processor") is not None:
        processors = [AnswerProcessor(item, prompt_length) for item in wrapped["logits_processor"]]
        wrapped["logits_processor"] = LogitsProcessorList(processors)
    return wrapped


def drop_prompts(output: Any, prompt_length: int) -> Any:
    """Keep the answers of a result of ``generate``: a tensor (B, N), or an output with ``sequences`` (B, N)."""
    if isinstance(output, Tensor):
        return output[:, prompt_length:]
    output.sequences = output.sequences[:, prompt_length:]
    return output
