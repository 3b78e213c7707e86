"""Answering a batch of prompts, with the layers each ran and the time it took."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from fuzzyroe.cache import kept_layers
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.data.preprocess import encode_prompt
from llava.eval.generation_options import GenerationOptions
from llava.image_tokens import count_image_features, count_image_tokens
from llava.mm_utils import process_images
from llava.model.builder import Checkpoint
from llava.model.planned_prompts import PlannedPrompt, generate_planned, plan_prompts
from llava.model.token_pruning import plan_visual_tokens, prune_inputs, set_token_pruning


@dataclass(frozen=True)
class Message:
    """A person's message: text with one ``<image>`` marker per image, and the PIL images in their order."""

    text: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class GeneratedBatch:
    """Answers of a batch.

    Attributes:
        texts: The answers, B.
        num_new_tokens: Tokens generated for each answer, its end-of-sequence token included, B.
        num_prompt_tokens: Tokens of each prompt with its images expanded, without padding, B.
        kept_layers: True where the example ran the layer, (B, L) bool on the CPU; all True for a dense model.
        prefill_ms: From the call until every row has its first token: vision tower, projector, router, decoder. What
            was done to plan prompts beforehand is in it.
        decode_ms: From there to the end of the batch.
    """

    texts: list[str]
    num_new_tokens: list[int]
    num_prompt_tokens: list[int]
    kept_layers: Tensor
    prefill_ms: float
    decode_ms: float


def make_message(text: str, images: Sequence[Any]) -> Message:
    """Put one ``<image>`` line per image in front of a text without markers of its own, as in LLaVA's training.

    Raises:
        ValueError: If the text has markers, but not as many as there are images.
    """
    num_markers = text.count(DEFAULT_IMAGE_TOKEN)
    if num_markers not in (0, len(images)):
        raise ValueError(
            f"The text has {num_markers} {DEFAULT_IMAGE_TOKEN} markers, but there are {len(images)} images; give one "
            f"marker per image, or none: {text[:80]!r}"
        )
    prefix = "" if num_markers else f"{DEFAULT_IMAGE_TOKEN}\n" * len(images)
    return Message(prefix + text, tuple(images))


def pad_left(rows: list[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Give token ids with padding in front, and the attention mask, 0 at padding; both (B, N) int64."""
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


class Generator:
    """A checkpoint that answers batches of messages.

    An answer does not depend on the batch it is in: rows are padded on the left under a mask, and every row is routed
    on its own.

    Args:
        checkpoint: Loaded checkpoint; its model is in eval mode, on its device.
        template: Empty conversation of the wanted template.
        visual_tokens: Numbers of tokens, ascending, of which the router's score picks one for each prompt's images
            (``plan_visual_tokens``); empty gives every image as many as the model's configuration says.
    """

    def __init__(self, checkpoint: Checkpoint, template: Conversation, visual_tokens: Sequence[int] = ()) -> None:
        self.visual_tokens = tuple(visual_tokens)
        if self.visual_tokens:
            set_token_pruning(checkpoint.model, count_image_features(checkpoint.model.config))
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
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
        rows = [self._encode_prompt(message.text) for message in messages]
        input_ids, attention_mask = pad_left(rows, self.padding)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        images = [image for message in messages for image in message.images]
        if images:
            pixel_values = process_images(images, self.image_processor, self.model.config)
            inputs["pixel_values"] = pixel_values.to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    @torch.inference_mode()
    def generate(self, messages: Sequence[Message], options: GenerationOptions) -> GeneratedBatch:
        """Answer a batch of messages; encoding them is not part of the times."""
        inputs = self.encode(messages)
        clock = _Clock(self.model.device)
        inputs = self._choose_lengths(inputs)
        lengths, generate = inputs["attention_mask"].sum(dim=1).tolist(), self.model.generate
        return self._run(functools.partial(generate, **inputs), options, clock, lengths, inputs["input_ids"].shape[1])

    @torch.inference_mode()
    def plan(self, messages: Sequence[Message]) -> tuple[list[PlannedPrompt], float]:
        """Plan a batch of messages, to be answered by ``generate_planned``; give the milliseconds it took, too.

        Encoding them is not part of the time.
        """
        inputs = self.encode(messages)
        clock = _Clock(self.model.device)
        prompts = plan_prompts(self.model, self._choose_lengths(inputs))
        return prompts, 1e3 * (clock.read() - clock.start)

    @torch.inference_mode()
    def generate_planned(
        self, prompts: Sequence[PlannedPrompt], options: GenerationOptions, planning_ms: float = 0.0
    ) -> GeneratedBatch:
        """Answer a batch of planned prompts as ``generate`` would; ``planning_ms`` counts as part of their prefill."""
        generate = functools.partial(generate_planned, self.model, prompts)
        lengths = [len(prompt.states) for prompt in prompts]
        batch = self._run(generate, options, _Clock(self.model.device), lengths, 0)
        return replace(batch, prefill_ms=batch.prefill_ms + planning_ms)

    def _run(
        self, generate: Callable, options: GenerationOptions, clock: _Clock, lengths: list[int], prompt_length: int
    ) -> GeneratedBatch:
        """Answer prompts of some lengths; their first ``prompt_length`` tokens stand in front of every answer."""
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
        new_rows = output.sequences[:, prompt_length:].tolist()
        answers = [self._without_padding(row) for row in new_rows]
        texts = [options.cut(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        # The beams of an example share its decision, and a beam search keeps the cache in the order of its examples.
        kept = kept_layers(output.past_key_values, len(lengths) * options.num_beams)[:: options.num_beams]
        return GeneratedBatch(
            texts=texts,
            num_new_tokens=[len(answer) for answer in answers],
            num_prompt_tokens=lengths,
            kept_layers=kept,
            prefill_ms=1e3 * (clock.first_token - clock.start),
            decode_ms=1e3 * (finished - clock.first_token),
        )

    def _choose_lengths(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let the score choose how many tokens each image has, where it is to."""
        if not self.visual_tokens or "pixel_values" not in inputs:
            return inputs
        return prune_inputs(self.model, inputs, plan_visual_tokens(self.model, inputs, self.visual_tokens))

    def _encode_prompt(self, text: str) -> list[int]:
        conversation = self.template.copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        image_token = self.model.config.image_token_id
        return encode_prompt(conversation, self.tokenizer, self.num_image_tokens, image_token)[0]

    def _without_padding(self, row: list[int]) -> list[int]:
        for index, token in enumerate(row):
            if token in self.end_tokens:
                return row[: index + 1]
        length = len(row)
        while length and row[length - 1] == self.padding:
            length -= 1
        return row[:length]


class _Clock(StoppingCriteria):
    """Stops nothing; ``generate`` calls it after each token, so its first call is the end of prefill."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_token: float | None = None
        self.start = self.read()

    def read(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Stop no row, (B,) bool."""
        if self.first_token is None:
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
