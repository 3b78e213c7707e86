"""LLaVA model as its users call it: transformers' own, in LLaVA's calling convention too, and with a skip rate.

In LLaVA's convention a prompt holds the id -200 for an image and comes with ``images``; in transformers' it holds the
image token once per position and comes with ``pixel_values``.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from fuzzyroe.attach import attach, find_router, refuse_skip_rate_if_dense
from fuzzyroe.cache import has_started
from fuzzyroe.routing_state import RoutingState
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.families import HostInnerModel, HostModel, count_image_tokens, get_image_token_id
from llava.model.llava_convention import (
    VisionTowerFacade,
    drop_prompts,
    expand_markers,
    has_markers,
    images_per_row,
    infer_attention_mask,
    match_images,
    show_answers_only,
    stack_images,
)
from llava.model.token_pruning import embed_prompts, has_token_pruning

_NOT_GIVEN: Any = object()
"""Default of ``images``: LLaVA's callers pass None for text, transformers' do not pass it at all."""

_AnyHostModel: Any = HostModel  # transformers types the ``self`` of generate as a protocol that no model meets


class LlavaLlamaForCausalLM(_AnyHostModel):
    """``LlavaForConditionalGeneration`` with LLaVA's calling convention; ``adopt`` makes one of a loaded model.

    ``forward`` does not name ``mm_encoder_outputs``, so that ``generate`` hands pixel values down to the decoder's
    router in every version of transformers instead of encoding images beforehand.
    """

    @classmethod
    def adopt(cls, model: Any, image_processor: Any = None) -> LlavaLlamaForCausalLM:
        """Give a loaded model this class, in place, and its image processor; weights and their names stay."""
        if "_old_forward" in model.__dict__:  # accelerate's hook calls this bound method instead of the class's
            model._old_forward = MethodType(cls.forward, model)
            model.forward.__wrapped__ = model._old_forward  # its signature is what generate goes by
        model.__class__ = cls
        model.image_processor = image_processor
        # what LLaVA's code reads from a configuration, and a checkpoint in transformers' layout may lack
        defaults = {
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "tokenizer_model_max_length": model.config.text_config.max_position_embeddings,
        }
        for name, value in defaults.items():
            if not hasattr(model.config, name):
                setattr(model.config, name, value)
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> LlavaLlamaForCausalLM:
        """Raise TypeError: layout, base model and routing of a checkpoint are the loader's business."""
        raise TypeError(
            "LlavaLlamaForCausalLM.from_pretrained knows nothing of checkpoint layouts and routing; use "
            "llava.model.builder.load_pretrained_model, which reads them all."
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and as a model of transformers' class, which any tool can load."""
        # transformers writes the name of the class into config.json
        self.__class__ = _AnyHostModel
        try:
            self.save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = LlavaLlamaForCausalLM

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        images: Any = None,
        image_sizes: Any = None,
        skip_rate: Tensor | float | None = None,
        routing: RoutingState | None = None,
        num_drafted: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Predict the next token at each position, in either convention.

        Args:
            input_ids: Token ids, (B, N); -200 stands for an image in LLaVA's convention.
            pixel_values: Images for expanded ids, (images, 3, H, W).
            attention_mask: 0 at padding, (B, N). In LLaVA's convention padding may be on either side.
            position_ids, inputs_embeds: For expanded ids only: positions, (B, N); embeddings instead of ids, (B, N, D).
            past_key_values: Keys and values of what came before. Images were read then: they are not read again.
            labels: Labels, aligned with ``input_ids``, (B, N).
            logits_to_keep: Give logits of that many last positions; 0 for all.
            images, image_sizes: LLaVA's convention: images in the order of the markers, see ``stack_images``; their
                sizes before they were processed, which are counted only.
            skip_rate: Mean skip rate of a routed model for this call, one number or one per row, (B,).
            routing: State of these prompts, if the caller decides or describes them. In ``generate`` it is that of the
                expanded rows: each prompt once per beam or returned sequence.
            num_drafted: Last positions of every row that are drafts of the answer, and hence no part of the question.
            **kwargs: As for ``LlavaForConditionalGeneration``.

        Returns:
            What transformers' class gives. In LLaVA's convention its N is that of the expanded prompts, padded on the
            side on which they were padded, else on the right.

        Raises:
            ValueError: If conventions are mixed, images do not fit markers, or a skip rate is asked of a dense model,
                in training, or together with ``routing``.
        """
        prompt: dict[str, Any] = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        if has_markers(input_ids) or (images is not None and not has_started(past_key_values)):
            _refuse_mixture(pixel_values=pixel_values, inputs_embeds=inputs_embeds, position_ids=position_ids)
            prompt |= self._expand(input_ids, attention_mask, images, image_sizes, labels=labels)
        elif images is None and image_sizes is not None:
            kwargs["image_sizes"] = image_sizes
        state = self._describe_prompt(prompt, skip_rate, routing, num_drafted)
        if state is not None:
            kwargs["routing"] = state
        if prompt["input_ids"] is not None and prompt["pixel_values"] is not None and has_token_pruning(self):
            # the stock forward would ask for as many positions as an image has features
            names = ("vision_feature_layer", "vision_feature_select_strategy")
            options = {name: kwargs.pop(name) for name in names if name in kwargs}
            states = embed_prompts(self.model, prompt["input_ids"], prompt["pixel_values"], state, **options)
            prompt |= {"input_ids": None, "pixel_values": None, "inputs_embeds": states}
        return super().forward(**prompt, position_ids=position_ids, logits_to_keep=logits_to_keep, **kwargs)

    def _describe_prompt(
        self, prompt: dict[str, Any], skip_rate: Tensor | float | None, routing: RoutingState | None, num_drafted: int
    ) -> RoutingState | None:
        """Give the state of this call; None leaves it to the decoder's hook, which knows of no image."""
        refuse_skip_rate_if_dense(self, skip_rate)
        if skip_rate is not None and (routing is not None or self.training):
            found = "together with routing" if routing is not None else "in training"
            raise ValueError(
                f"skip_rate was given {found}, where the routing state alone says what is skipped; set its "
                "target_skip_ratio, or leave routing out and call eval()."
            )
        is_routed = getattr(find_router(self), "enabled", False) and not self.training
        # a started cache holds the decisions of its prompt, which a decoding step must not take again
        if routing is not None or has_started(prompt["past_key_values"]) or not (is_routed or skip_rate is not None):
            return routing
        if prompt["input_ids"] is None and prompt["attention_mask"] is None:
            embeddings = prompt["inputs_embeds"]
            prompt = {"attention_mask": torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)}
        state = RoutingState.from_batch(prompt, get_image_token_id(self.config), num_drafted=num_drafted)
        return replace(state, target_skip_ratio=skip_rate)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; what stands behind the prompt when it is first read is a draft, and said to be one.

        Its signature names ``inputs_embeds``, as transformers looks there whether embeddings may be given.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # prompt lookup runs the prompt together with its first draft, which the router must not read as question
        if prompt_length is not None and is_first_iteration and input_ids.shape[1] > prompt_length:
            inputs["num_drafted"] = input_ids.shape[1] - prompt_length
        return inputs

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, images: Any = _NOT_GIVEN, image_sizes: Any = None, **kwargs: Any
    ) -> Any:
        """Continue prompts, in either convention.

        A call with ``images``, be it None, or with -200 in its ids is one in LLaVA's convention: it gives the new
        tokens alone, and its own stopping criteria, logits processors and streamer see these alone. Any other call is
        that of transformers.

        Args:
            inputs: Token ids, (B, N), padded on either side; or ``input_ids`` by name.
            images, image_sizes: As for ``forward``; None for text.
            **kwargs: As for transformers' ``generate``; ``skip_rate`` as for ``forward``.

        Returns:
            Token ids, (B, new tokens), or a transformers output with these as ``sequences``.

        Raises:
            ValueError: If conventions are mixed, or images do not fit markers.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if images is _NOT_GIVEN and not has_markers(input_ids):
            sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
            return super().generate(inputs, **sizes, **_with_prompt_length(kwargs, input_ids, self.generation_config))
        kwargs.pop("input_ids", None)
        _refuse_mixture(**{name: kwargs.pop(name, None) for name in ("pixel_values", "inputs_embeds", "position_ids")})
        padding_id = kwargs.get("pad_token_id")
        expanded = self._expand(
            input_ids,
            kwargs.pop("attention_mask", None),
            None if images is _NOT_GIVEN else images,
            image_sizes,
            padding_id=padding_id,
            is_padded_left=True,
        )
        # from here on it is a call in transformers' convention, whose ids begin with the prompt
        prompt_length = expanded["input_ids"].shape[1]
        kwargs = _with_prompt_length(kwargs, expanded["input_ids"], self.generation_config)
        given = {name: value for name, value in expanded.items() if value is not None}
        return drop_prompts(super().generate(**given, **show_answers_only(kwargs, prompt_length)), prompt_length)

    def get_model(self) -> HostInnerModel:
        """The model without its output head."""
        return self.model

    def get_vision_tower(self) -> VisionTowerFacade:
        """The vision tower under LLaVA's names."""
        return VisionTowerFacade(self, self.image_processor)

    def encode_images(self, images: Tensor) -> Tensor:
        """Features that the decoder reads: (images, 3, H, W) to (images, patches, D)."""
        views, _ = stack_images(images)
        return torch.stack(list(self.model.get_image_features(self._place(views), return_dict=True).pooler_output))

    def _expand(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        images: Any,
        image_sizes: Any,
        labels: Tensor | None = None,
        padding_id: int | None = None,
        is_padded_left: bool | None = None,
    ) -> dict[str, Any]:
        """Bring a call in LLaVA's convention into transformers'."""
        if input_ids is None:
            raise ValueError("Images came without a prompt; pass token ids as the first argument.")
        input_ids = input_ids.to(self.device)
        # without a mask, padding is told by its id, unless it is the id that also ends answers
        padding_id, is_padding_known = self._find_padding(padding_id)
        if attention_mask is None:
            attention_mask = infer_attention_mask(input_ids, padding_id if is_padding_known else None)
        attention_mask = attention_mask.to(input_ids.device).bool()
        views, num_views = stack_images(images)
        if image_sizes is not None and len(image_sizes) != len(num_views):
            raise ValueError(
                f"{len(image_sizes)} image_sizes meet {len(num_views)} images; give one per image, or none."
            )
        # LLaVA's collator gives text samples a black image, which has no marker and is dropped here
        num_markers = ((input_ids == IMAGE_TOKEN_INDEX) & attention_mask).sum(dim=1).tolist()
        views, num_views = match_images(num_markers, views, num_views)
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge != "flat" and any(count > 1 for count in num_views):
            raise ValueError(
                f"mm_patch_merge_type is {merge!r}, which arranges tiles by a weight that LLaVA-1.5 does not have; "
                "tiles can be read one after the other, 'flat'. Set that, or image_aspect_ratio 'pad'."
            )
        num_positions = count_image_tokens(self.config)
        prompts = expand_markers(
            input_ids,
            attention_mask,
            [count * num_positions for count in num_views],
            get_image_token_id(self.config),
            padding_id,
            bool((~attention_mask[:, 0]).any()) if is_padded_left is None else is_padded_left,
            labels,
        )
        pixel_values = None if views is None else self._place(views)
        return {**vars(prompts), "pixel_values": pixel_values}

    def _place(self, images: Any) -> Tensor:
        tower = self.model.vision_tower
        return images.to(tower.device, tower.dtype)

    def _find_padding(self, padding_id: int | None) -> tuple[int, bool]:
        """Token id of padding, and whether padding can be told from text by it."""
        settings, ends = self.generation_config, self.generation_config.eos_token_id
        candidates = (padding_id, settings.pad_token_id, self.config.text_config.pad_token_id)
        padding_id = next((candidate for candidate in candidates if candidate is not None), None)
        ends = ends if isinstance(ends, list) else [ends]
        return (0, False) if padding_id is None else (padding_id, padding_id not in ends)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each row for its beams; transformers would repeat image by image, which mixes up a row's images."""
        pixel_values = kwargs.get("pixel_values")
        repeated, options = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixel_values is not None and input_ids is not None and expand_size > 1:
            counts = images_per_row(input_ids, get_image_token_id(self.config), len(pixel_values))
            rows = pixel_values.split(counts)
            options["pixel_values"] = torch.cat([row.repeat(expand_size, 1, 1, 1) for row in rows])
        return repeated, options


def _with_prompt_length(options: dict[str, Any], input_ids: Tensor | None, default: Any) -> dict[str, Any]:
    """Options of ``generate`` that tell drafts by prompt lookup from the prompt, which are first read together."""
    config = options.get("generation_config") or default
    if input_ids is None or not options.get("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens):
        return options
    return {**options, "prompt_length": input_ids.shape[1]}


def _refuse_mixture(**arguments: Tensor | None) -> None:
    """Raise ValueError if arguments of transformers' convention came with those of LLaVA's."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"{' and '.join(given)} came with images or image markers (id -200), which are replaced here; give prompts "
            "with markers and images, or expanded ids and pixel_values."
        )


def attach_routing(
    model: Any, router: Any, adapter_width: int, adapter_init: str = "zero", skip_unit: str = "layer"
) -> LlavaLlamaForCausalLM:
    """Make the decoder layers of a LLaVA model skippable, in place; ``fuzzyroe.detach`` undoes it.

    Arguments and errors are those of ``fuzzyroe.attach``. A model of transformers' own class becomes a
    ``LlavaLlamaForCausalLM``, whose forward tells the router where images and questions are; only token ids know.
    """
    if not isinstance(model, LlavaLlamaForCausalLM):
        model = LlavaLlamaForCausalLM.adopt(model)
    attach(model, adapter_width, adapter_init, router, skip_unit)
    return model


class TextBatchSafeModel(HostInnerModel):
    """``HostInnerModel`` whose soft-routed and training forward always passes through vision tower and projector.

    Under ZeRO-3 a rank with text alone would hang beside one with images. A batch without images gets one blank image
    whose features are multiplied by zero and added to the embeddings: the result is the same, every rank gathers the
    same weights in the same order, and every parameter has a gradient. All else is ``HostInnerModel`` unchanged.
    """

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        """As ``HostInnerModel.forward``; shapes (B, N) and (images, 3, H, W)."""
        is_trained_on = self.training or getattr(kwargs.get("routing"), "mode", None) == "soft"
        if not is_trained_on or pixel_values is not None or input_ids is None:
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        embeddings = self.get_input_embeddings()(input_ids)
        vision: Any = self.config.vision_config
        blank = embeddings.new_zeros(1, 3, vision.image_size, vision.image_size)
        features = torch.cat(list(self.get_image_features(blank, return_dict=True).pooler_output))
        # zero before the sum: features summed first overflow float16, and 0 * inf is nan
        return super().forward(**{**kwargs, "inputs_embeds": embeddings + (0 * features).sum()})


def make_text_batches_safe(model: HostModel) -> None:
    """Let text-only batches stand beside image batches on other ranks; names and weights stay."""
    model.model.__class__ = TextBatchSafeModel
