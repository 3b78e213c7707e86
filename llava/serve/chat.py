"""A conversation with a checkpoint about one image, turn by turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.attach import find_decoder
from fuzzyroe.cache import kept_layers
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, get_template
from llava.image_tokens import count_image_tokens
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token

DEFAULT_TEMPLATE = "v1"
"""LLaVA-1.5's, for a checkpoint that does not name the template it was trained with."""


@dataclass(frozen=True)
class ChatOptions:
    """How answers are generated.

    Attributes:
        temperature: Of the drawing; 0 takes the likeliest token.
        top_p: Probability mass that is drawn from, in (0, 1]; None for all of it.
        max_new_tokens: Longest answer, at least 1; shorter where the model's context ends before.
    """

    temperature: float = 0.2
    top_p: float | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature}; it is 0 (the likeliest token) or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; it lies in (0, 1]. Leave it out to draw from all tokens.")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens is {self.max_new_tokens}; it is at least 1.")

    def to_generate_kwargs(self) -> dict[str, Any]:
        """Keywords for ``generate``."""
        kwargs: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if not kwargs["do_sample"]:
            return {**kwargs, "temperature": None, "top_p": None, "top_k": None}
        return {**kwargs, "temperature": self.temperature, **({} if self.top_p is None else {"top_p": self.top_p})}


@dataclass(frozen=True)
class Answer:
    """What the model said, and how.

    Attributes:
        text: The answer, without what ends it.
        prompt: The prompt it continues.
        skipped: Layers that an adapter stood in for; None for a model without routing.
        num_layers: Layers of the decoder.
    """

    text: str
    prompt: str
    skipped: tuple[int, ...] | None
    num_layers: int


class Chat:
    """A conversation; what was said so far is part of every prompt.

    Args:
        tokenizer, model, image_processor, context_length: What ``load_pretrained_model`` gives.
        template: Name of a conversation template.
        options: How answers are generated.
        image: PIL image that the first question is about; None for a conversation without.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        image_processor: Any,
        context_length: int,
        template: str,
        options: ChatOptions,
        image: Any = None,
    ) -> None:
        self.tokenizer, self.model, self.image_processor = tokenizer, model, image_processor
        self.context_length, self.template, self.options = context_length, template, options
        self.start_anew(image)

    def start_anew(self, image: Any = None) -> None:
        """Forget what was said, and talk about another image, or none."""
        self.conversation: Conversation = get_template(self.template)
        self.image = image
        self._pixels = None if image is None else process_images([image], self.image_processor, self.model.config)
        self._marker = "" if image is None else DEFAULT_IMAGE_TOKEN
        if image is not None and getattr(self.model.config, "mm_use_im_start_end", False):
            self._marker = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN

    def ask(self, question: str, streamer: Any = None) -> Answer:
        """Answer one question.

        Args:
            question: Text without image tags; the image is put in front of the first one.
            streamer: Is given the answer's tokens as they come.

        Raises:
            ValueError: If the question fills the model's context; nothing is added to the conversation.
        """
        conversation = self.conversation.copy()
        is_first = len(conversation.messages) == conversation.offset
        shown = f"{self._marker}\n{question}" if is_first and self._marker else question
        conversation.append_message(conversation.roles[0], shown)
        conversation.append_message(conversation.roles[1], None)
        prompt = conversation.get_prompt()
        input_ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        options = {**self.options.to_generate_kwargs(), "max_new_tokens": self._longest_answer(input_ids)}
        end = (conversation.sep2 or conversation.sep).strip()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids.to(self.model.device),
                images=self._pixels,
                image_sizes=None if self.image is None else [self.image.size],
                streamer=streamer,
                use_cache=True,  # a checkpoint saved by training has it off
                return_dict_in_generate=True,
                stopping_criteria=[KeywordsStoppingCriteria([end] if end else [], self.tokenizer, input_ids)],
                **options,
            )
        text = self.tokenizer.decode(output.sequences[0], skip_special_tokens=True)
        text = (text.partition(end)[0] if end else text).strip()
        conversation.messages[-1][1] = text
        self.conversation = conversation
        keep = kept_layers(output.past_key_values, 1)[0].tolist()
        skipped = tuple(layer for layer, is_kept in enumerate(keep) if not is_kept)
        return Answer(text, prompt, skipped if self.is_routed else None, len(keep))

    @property
    def is_routed(self) -> bool:
        """Whether layers may be skipped."""
        return bool(getattr(self._router, "enabled", False))

    @property
    def skip_rate(self) -> float:
        """Mean skip rate that a routed model plans for."""
        return float(self._router.target_skip_ratio)

    @property
    def _router(self) -> Any:
        return getattr(find_decoder(self.model), "router", None)

    def _longest_answer(self, input_ids: Tensor) -> int:
        """Tokens that an answer may have, at least 1."""
        num_images = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        num_tokens = input_ids.shape[1] + num_images * (count_image_tokens(self.model.config) - 1)
        if num_tokens >= self.context_length:
            raise ValueError(
                f"The conversation has {num_tokens:,} tokens, which leaves no room for an answer in the "
                f"model's context of {self.context_length:,}; start anew, or ask in fewer words."
            )
        return min(self.options.max_new_tokens, self.context_length - num_tokens)


def choose_template(asked: str | None, config: Any) -> tuple[str, str]:
    """The template to talk in, and why.

    Args:
        asked: What the user asked for; None to go by the checkpoint.
        config: The model's configuration; ``conv_template`` names the template of its training.

    Raises:
        KeyError: If the template is unknown.
    """
    named = getattr(config, "conv_template", None)
    if asked is not None:
        chosen, reason = asked, "--conv-mode"
    elif named is not None:
        chosen, reason = named, "named by the checkpoint"
    else:
        chosen, reason = DEFAULT_TEMPLATE, "LLaVA-1.5's; the checkpoint names none, --conv-mode chooses another"
    get_template(chosen)
    return chosen, reason
