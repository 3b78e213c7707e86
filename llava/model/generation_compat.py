"""Generation in LLaVA's convention: callers see answers, without the prompts before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


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
        """Pass on that the answer is complete."""
        self.streamer.end()


def show_answers_only(options: dict[str, Any], prompt_length: int) -> dict[str, Any]:
    """Wrap the stopping criteria, logits processors and streamer of ``generate`` so that they see answers only."""

    def hide_prompts(inner: Callable) -> Any:
        # a function, because transformers looks for further arguments in the signature of a processor's ``__call__``
        return lambda input_ids, scores, **kwargs: inner(input_ids[:, prompt_length:], scores, **kwargs)

    wrapped = dict(options)
    if wrapped.get("streamer") is not None:
        wrapped["streamer"] = AnswerStreamer(wrapped["streamer"], prompt_length)
    for name, kind in (("stopping_criteria", StoppingCriteriaList), ("logits_processor", LogitsProcessorList)):
        if wrapped.get(name) is not None:
            wrapped[name] = kind(map(hide_prompts, wrapped[name]))
    return wrapped


def drop_prompts(output: Any, prompt_length: int) -> Any:
    """Keep the answers of a result of ``generate``: a tensor (B, N), or an output with ``sequences`` (B, N)."""
    if isinstance(output, Tensor):
        return output[:, prompt_length:]
    output.sequences = output.sequences[:, prompt_length:]
    return output
