"""Generator: prompts in, answers out, with the layers that each answer ran and the time it took."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria, StoppingCriteriaList

from fuzzyroe.cache import kept_layers, prefill_runs
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.data.preprocess import encode_prompt
from llava.mm_utils import process_images
from llava.model.builder import Checkpoint
from llava.model.families import count_image_features, count_image_tokens, get_image_token_id
from llava.model.prefill_plans import PlannedPrompt, generate_planned, plan_prompts
from llava.model.token_pruning import plan_visual_tokens, prune_inputs, set_token_pruning

logger = logging.getLogger(__name__)

DENSE = "off"
"""The target skip rate of the dense model, in words."""

LMMS_EVAL_DEFAULT_UNTIL = "\n\n"
"""Put into every task that sets no ``until``; as a stop string it would cut long answers after one paragraph."""


@dataclass(frozen=True)
class GenerationOptions:
    """Options of generation; the defaults are greedy.

    Attributes:
        max_new_tokens: Longest answer in tokens, at least 1.
        until: Strings at which an answer ends; the string itself is cut off.
        do_sample: Whether tokens are sampled instead of taking the likeliest.
        temperature: Temperature of sampling, above 0; None leaves it to the model's generation configuration.
        top_p: Probability mass to sample from, in (0, 1]; None leaves it to the model's generation configuration.
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
        """Read lmms-eval's ``generation_kwargs``; a temperature of 0 is greedy, whatever ``do_sample`` says.

        Args:
            gen_kwargs: As in a task's yaml, or from ``--gen_kwargs``. Unknown keys are named in a warning and ignored,
                as lmms-eval's own models do; tasks carry some for one particular model.

        Example:
            >>> GenerationOptions.from_gen_kwargs({"max_new_tokens": 16, "temperature": 0, "until": ["\\n\\n"]})
            GenerationOptions(max_new_tokens=16, until=(), do_sample=False, temperature=None, top_p=None, num_beams=1)
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
            # None, because a checkpoint's own sampling settings would be warned about
            return {**kwargs, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        sampling = {"temperature": self.temperature, "top_p": self.top_p}
        return {**kwargs, "do_sample": True, **{name: value for name, value in sampling.items() if value is not None}}

    def cut(self, text: str) -> str:
        """Cut an answer at its first stop string, and strip spaces around it.

        Example:
            >>> GenerationOptions(until=("USER",)).cut(" seven USER eight")
            'seven'
        """
        ends = [text.find(stop) for stop in self.until if stop in text]
        return text[: min(ends, default=len(text))].strip()


def parse_skip_rate(value: float | str | None, name: str = "skip_rate") -> float | None:
    """Read a target skip rate as users write it; None for None and for "off", the dense model.

    Raises:
        ValueError: If it is neither a number nor "off"; the message calls it ``name``.

    Example:
        >>> parse_skip_rate("0.3"), parse_skip_rate("off")
        (0.3, None)
    """
    if value is None or value == DENSE:
        return None
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"{name} is {value!r}; give a number in [0, 1) or '{DENSE}' for the dense model, or leave it out to use "
            "the checkpoint's own."
        ) from None


@dataclass(frozen=True)
class Message:
    """A user's message: text with one ``<image>`` marker per image, and the PIL images in their order."""

    text: str
    images: tuple[Any, ...] = ()


def make_message(text: str, images: Sequence[Any]) -> Message:
    """Put one ``<image>`` line per image in front of a text without markers of its own, as in LLaVA's training.

    Raises:
        ValueError: If the text has markers, but not as many as there are images.

    Example:
        >>> make_message("How many digits are there?", ["a PIL image"]).text
        '<image>\\nHow many digits are there?'
    """
    num_markers = text.count(DEFAULT_IMAGE_TOKEN)
    if num_markers not in (0, len(images)):
        raise ValueError(
            f"The text has {num_markers} {DEFAULT_IMAGE_TOKEN} markers, but there are {len(images)} images; give one "
            f"marker per image, or none: {text[:80]!r}"
        )
    prefix = "" if num_markers else f"{DEFAULT_IMAGE_TOKEN}\n" * len(images)
    return Message(prefix + text, tuple(images))


@dataclass(frozen=True)
class GeneratedBatch:
    """Answers of a batch.

    Attributes:
        texts: The answers, B.
        num_new_tokens: Tokens generated for each answer, its end-of-sequence token included, B.
        num_prompt_tokens: Tokens of each prompt with its images expanded, without padding, B.
        kept_layers: True where decoding ran the layer, (B, L) bool on the CPU; all True for a dense model.
        prefill_runs: How often the prefill ran each layer over the example, reruns of an escalation included, (B, L)
            int64 on the CPU.
        prefill_ms: From the call until every row has its first token: vision tower, projector, router, decoder.
            Planning done beforehand is included.
        decode_ms: From there to the end of the batch.
    """

    texts: list[str]
    num_new_tokens: list[int]
    num_prompt_tokens: list[int]
    kept_layers: Tensor
    prefill_runs: Tensor
    prefill_ms: float
    decode_ms: float

    @property
    def prefill_skip_rates(self) -> Tensor:
        """Net skip rate of each prefill, (B,): one less the layers run per position over all layers, reruns counted."""
        return 1 - self.prefill_runs.float().mean(dim=1)

    @property
    def decode_skip_rates(self) -> Tensor:
        """Skip rate of each answer behind its first token, (B,)."""
        return 1 - self.kept_layers.float().mean(dim=1)


class Generator:
    """A checkpoint that answers batches of messages.

    An answer does not depend on the batch it is in: rows are padded on the left under a mask, and every row is routed
    on its own.

    Args:
        checkpoint: Loaded checkpoint; its model is in eval mode, on its device.
        template: Empty conversation of the wanted template.
        visual_tokens: Numbers of tokens, ascending, from which the router's score picks one for each prompt's images
            (``plan_visual_tokens``); empty gives every image as many as the model's configuration says.
    """

    def __init__(self, checkpoint: Checkpoint, template: Conversation, visual_tokens: Sequence[int] = ()) -> None:
        self.visual_tokens = tuple(visual_tokens)
        if self.visual_tokens:
            # prompts are encoded in full, then shortened to what the score asks for
            set_token_pruning(checkpoint.model, count_image_features(checkpoint.model.config))
        self.model: Any = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.image_processor, self.template = checkpoint.image_processor, template
        self.num_image_tokens = count_image_tokens(self.model.config)
        end = self.model.generation_config.eos_token_id
        self.end_tokens = {self.tokenizer.eos_token_id} if end is None else {end} if isinstance(end, int) else set(end)
        padding = self.tokenizer.pad_token_id
        self.padding = min(self.end_tokens) if padding is None else padding

    def encode(self, messages: Sequence[Message]) -> dict[str, Tensor]:
        """Turn messages into the model's inputs.

        Returns:
            ``input_ids`` and ``attention_mask``, (B, N), and where there are images ``pixel_values``,
            (images, 3, H, W), on the model's device.
        """
        input_ids, attention_mask = pad_left([self._encode_prompt(message.text) for message in messages], self.padding)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        images = [image for message in messages for image in message.images]
        if images:
            pixel_values = process_images(images, self.image_processor, self.model.config)
            inputs["pixel_values"] = pixel_values.to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def generate(self, messages: Sequence[Message], options: GenerationOptions) -> GeneratedBatch:
        """Answer a batch of messages; the times leave out encoding."""
        inputs = self.encode(messages)
        clock = _Clock(self.model.device)  # before the shortening, in which vision tower and router run
        inputs = self._shorten_images(inputs)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        generate = functools.partial(self.model.generate, **inputs)
        return self._run(generate, options, clock, lengths, prompt_length=inputs["input_ids"].shape[1])

    @torch.inference_mode()
    def plan(self, messages: Sequence[Message]) -> tuple[list[PlannedPrompt], float]:
        """Plan a batch of messages for ``generate_planned``, and give the milliseconds it took without encoding."""
        inputs = self.encode(messages)
        clock = _Clock(self.model.device)
        prompts = plan_prompts(self.model, self._shorten_images(inputs))
        return prompts, 1e3 * (clock.read() - clock.start)

    @torch.inference_mode()
    def generate_planned(
        self, prompts: Sequence[PlannedPrompt], options: GenerationOptions, planning_ms: float = 0.0
    ) -> GeneratedBatch:
        """Answer a batch of planned prompts as ``generate`` would; ``planning_ms`` counts as part of their prefill."""
        generate = functools.partial(generate_planned, self.model, prompts)
        lengths = [len(prompt.states) for prompt in prompts]
        batch = self._run(generate, options, _Clock(self.model.device), lengths, prompt_length=0)
        return replace(batch, prefill_ms=batch.prefill_ms + planning_ms)

    def _run(
        self, generate: Callable, options: GenerationOptions, clock: _Clock, lengths: list[int], prompt_length: int
    ) -> GeneratedBatch:
        """Answer prompts of the given lengths, and drop the first ``prompt_length`` tokens of every sequence."""
        stops = [_StopStrings(self.tokenizer, options.until, prompt_length)] if options.until else []
        output = generate(
            **options.to_generate_kwargs(),
            use_cache=True,  # a checkpoint saved by training has it off
            eos_token_id=sorted(self.end_tokens),
            pad_token_id=self.padding,
            stopping_criteria=StoppingCriteriaList([clock, *stops]),
            return_dict_in_generate=True,
        )
        finished = clock.read()
        answers = [self._without_padding(row) for row in output.sequences[:, prompt_length:].tolist()]
        texts = [options.cut(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        # beams of one example share its decision, and a beam search keeps the cache in the order of its examples
        kept, runs = (
            read(output.past_key_values, len(lengths) * options.num_beams)[:: options.num_beams]
            for read in (kept_layers, prefill_runs)
        )
        return GeneratedBatch(
            texts=texts,
            num_new_tokens=[len(answer) for answer in answers],
            num_prompt_tokens=lengths,
            kept_layers=kept,
            prefill_runs=runs,
            prefill_ms=1e3 * (clock.first_token - clock.start),
            decode_ms=1e3 * (finished - clock.first_token),
        )

    def _shorten_images(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the image positions that the router's score does not ask for, where it is to choose."""
        if not self.visual_tokens or "pixel_values" not in inputs:
            return inputs
        return prune_inputs(self.model, inputs, plan_visual_tokens(self.model, inputs, self.visual_tokens))

    def _encode_prompt(self, text: str) -> list[int]:
        conversation = self.template.copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        image_token = get_image_token_id(self.model.config)
        return encode_prompt(conversation, self.tokenizer, self.num_image_tokens, image_token)[0]

    def _without_padding(self, row: list[int]) -> list[int]:
        ends = [index for index, token in enumerate(row) if token in self.end_tokens]
        if ends:
            return row[: ends[0] + 1]
        # no end token: the answer was cut off, and padding follows a stop string in a shorter row
        length = len(row)
        while length and row[length - 1] == self.padding:
            length -= 1
        return row[:length]


def pad_left(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Give token ids with padding in front, and the attention mask, 0 at padding; both (B, N) int64."""
    options: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([torch.tensor(row) for row in rows], padding_value=padding, **options)
    return ids, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], **options)


class _Clock(StoppingCriteria):
    """A criterion that stops nothing; ``generate`` calls it after each token, so its first call ends the prefill."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_token = math.nan
        self.start = self.read()

    def read(self) -> float:
        """Read the time in seconds, once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Stop no row, (B,) bool."""
        if math.isnan(self.first_token):
            self.first_token = self.read()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _StopStrings(StoppingCriteria):
    """Ends a row whose text holds a stop string; works for every tokenizer, unlike ``generate(stop_strings=)``."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length
        self.tail = max(map(len, stops)) + 4  # tokens that a stop string may stretch over, some of them without text

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Say which rows have ended, (B,) bool."""
        start = max(self.prompt_length, input_ids.shape[1] - self.tail)
        texts = self.tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        ended = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)
