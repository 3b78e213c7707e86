"""What a benchmark asks of a generation, read from lmms-eval's ``generation_kwargs``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

LMMS_EVAL_DEFAULT_UNTIL = "\n\n"
"""Put into every task that sets no ``until``; as a stop string it would cut long answers after one paragraph."""


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated; the defaults are greedy.

    Attributes:
        max_new_tokens: Most tokens of an answer, at least 1.
        until: Strings at which an answer ends; the string itself is cut off.
        do_sample: Whether tokens are drawn instead of taking the likeliest.
        temperature: Of the drawing, above 0; None leaves it to the model's generation configuration.
        top_p: Probability mass that is drawn from, in (0, 1]; None leaves it to the model's generation configuration.
        num_beams: Beams of a beam search, at least 1; 1 is none.
    """

    max_new_tokens: int = 1024
    until: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1. Correct generation_kwargs.")

    @classmethod
    def from_gen_kwargs(cls, gen_kwargs: dict[str, Any]) -> GenerationOptions:
        """Read ``generation_kwargs``; a temperature of 0 is greedy, whatever ``do_sample`` says.

        Args:
            gen_kwargs: As in a task's yaml, or from ``--gen_kwargs``. Keys that mean nothing here are named in a
                warning and left out, as lmms-eval's own models do; tasks carry some for one particular model.
        """
        rest = dict(gen_kwargs)
        until = rest.pop("until", None) or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        temperature, top_p = rest.pop("temperature", None), rest.pop("top_p", None)
        do_sample = bool(rest.pop("do_sample", bool(temperature))) and temperature != 0
        numbers = {name: int(rest.pop(name)) for name in ("max_new_tokens", "num_beams") if rest.get(name) is not None}
        if rest:
            logger.warning("generation_kwargs %s mean nothing to this model and are left out.", sorted(rest))
        return cls(
            until=tuple(stop for stop in until if stop and stop != LMMS_EVAL_DEFAULT_UNTIL),
            do_sample=do_sample,
            temperature=float(temperature) if do_sample and temperature is not None else None,
            top_p=float(top_p) if do_sample and top_p is not None else None,
            **numbers,
        )

    def to_generate_kwargs(self) -> dict[str, Any]:
        """Keywords for ``generate``, without ``until``."""
        kwargs: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if not self.do_sample:
            return {**kwargs, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        drawing = {"temperature": self.temperature, "top_p": self.top_p}
        return {**kwargs, "do_sample": True, **{name: value for name, value in drawing.items() if value is not None}}

    def cut(self, text: str) -> str:
        """An answer up to its first stop string, without blanks around it."""
        ends = [text.find(stop) for stop in self.until if stop in text]
        return text[: min(ends, default=len(text))].strip()
