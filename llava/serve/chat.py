"""Chat: a conversation with a checkpoint about one image, turn by turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuzzyroe.attach import find_router
from fuzzyroe.cache import kept_layers
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, get_template
from llava.inference.generator import GenerationOptions
from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token
from llava.model.families import count_image_tokens, family_of


@dataclass(frozen=True)
class Answer:
    """The model's answer, and the layers it took.

    Attributes:
        text: The answer, without the separator that ends it.
        prompt: The prompt it continues.
        skipped: Layers replaced by their adapters; None for a model without routing.
        num_layers: Layers of the decoder.
    """

    text: str
    prompt: str
    skipped: tuple[int, ...] | None
    num_layers: int


class Chat:
    """A conversation; every prompt holds all earlier turns.

    Args:
        tokenizer, model, image_processor, context_length: As ``load_pretrained_model`` gives them.
        template: Name of a conversation template.
        options: Options of generation.
        image: PIL image that the first question is about; None for a conversation without.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        image_processor: Any,
        context_length: int,
        template: str,
        options: GenerationOptions,
        image: Any = None,
    ) -> None:
        self.tokenizer, self.model, self.image_processor = tokenizer, model, image_processor
        self.context_length, self.template, self.options = context_length, template, options
        self.start_anew(image)

    def start_anew(self, image: Any = None) -> None:
        """Forget the conversation, and talk about another image, or none."""
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
            streamer: Receives the answer's tokens as they come.

        Raises:
            ValueError: If the question fills the model's context; nothing is added to the conversation.
        """
        # a copy, so that a question without an answer leaves no trace
        conversation = self.conversation.copy()
        is_first = len(conversation.messages) == conversation.offset
        text = f"{self._marker}\n{question}" if is_first and self._marker else question
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        prompt = conversation.get_prompt()
        input_ids = tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        end = (conversation.sep2 or conversation.sep).strip()
        options = {**self.options.to_generate_kwargs(), "max_new_tokens": self._longest_answer(input_ids)}
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
        said = self.tokenizer.decode(output.sequences[0], skip_special_tokens=True)
        said = (said.partition(end)[0] if end else said).strip()
        conversation.messages[-1][1] = said
        self.conversation = conversation
        keep = kept_layers(output.past_key_values, 1)[0].tolist()
        skipped = tuple(layer for layer, is_kept in enumerate(keep) if not is_kept)
        return Answer(said, prompt, skipped if self.target_skip_ratio is not None else None, len(keep))

    @property
    def target_skip_ratio(self) -> float | None:
        """Target skip rate of a routed model; None where no layer is skipped."""
        router = find_router(self.model)
        return float(router.target_skip_ratio) if router is not None and router.enabled else None

    def _longest_answer(self, input_ids: Tensor) -> int:
        """Count the tokens that an answer may have, at least 1."""
        num_images = int((input_ids == IMAGE_TOKEN_INDEX).sum())
        num_tokens = input_ids.shape[1] + num_images * (count_image_tokens(self.model.config) - 1)
        if num_tokens >= self.context_length:
            raise ValueError(
                f"The conversation has {num_tokens:,} tokens, which leaves no room for an answer in the "
                f"model's context of {self.context_length:,}; start anew, or ask in fewer words."
            )
        return min(self.options.max_new_tokens, self.context_length - num_tokens)


def choose_template(asked: str | None, config: Any) -> tuple[str, str]:
    """Choose the template to talk in, and give the reason.

    Args:
        asked: The user's choice; None to go by the checkpoint.
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
        family = family_of(config)
        chosen = family.template(config)
        reason = f"{family.title}'s; the checkpoint names none, --conv-mode chooses another"
    get_template(chosen)  # refuses an unknown name
    return chosen, reason
