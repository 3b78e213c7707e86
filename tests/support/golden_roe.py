"""The tiny model that the published RoE code was run on, rebuilt here, with its batch and its prompts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fuzzyroe.attach import attach, find_decoder
from fuzzyroe.routers import LinearRouter
from fuzzyroe.routers.roe.training import PUBLISHED, RoECompat
from fuzzyroe.routing_state import RoutingState
from fuzzyroe.state_dict import load_routing_state_dict

FOLDER = Path(__file__).resolve().parents[1] / "golden"
NUM_LAYERS, HIDDEN, ADAPTER_WIDTH, NUM_IMAGE_TOKENS = 4, 32, 16, 6
NUM_TOKENS = 4
"""Routing tokens in front of the golden training batch: one of the image, three of turns."""
IMAGE, IGNORE = -200, -100
BOUND = 3e-5  # float32 sums in another order: up to 2.2e-5 between processors, below 2e-5 on one


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def golden(key: str) -> Tensor:
    """One array of ``roe_golden.npz``."""
    return torch.from_numpy(arrays("roe_golden")[key].copy())


def assert_close(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Assert that numbers agree within ``BOUND``."""
    torch.testing.assert_close(found.float(), expected.float(), atol=BOUND, rtol=0, msg=lambda m: f"{what}: {m}")


ADAPTER_NAMES = {"adapter_MHA.conv_A": "adapter.down", "adapter_MHA.conv_B": "adapter.up"}
"""Names in the published checkpoint -> ours."""


def routing_name(published: str) -> str | None:
    """Our routing name of a published parameter; None for one of the backbone."""
    if published.startswith("model.adapter_"):
        return {"image": "router.source.tokens.image", "text": "router.source.tokens.text"}[published.split("_")[1]]
    if ".adapter_MHA_router." in published:
        return f"router.layers.{published.split('.')[2]}.weight"
    for theirs, ours in ADAPTER_NAMES.items():
        if theirs in published:
            return published.removeprefix("model.").replace(theirs, ours)
    return None


def build_model(compat: RoECompat = PUBLISHED, attention: str = "sdpa") -> LlamaForCausalLM:
    """The golden model with its weights, routed, in eval mode."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    published = {key[2:]: golden(key) for key in arrays("roe_golden") if key.startswith("w/")}
    backbone = {name: tensor for name, tensor in published.items() if routing_name(name) is None}
    model.load_state_dict(backbone)
    attach(model, ADAPTER_WIDTH, "xavier", LinearRouter(NUM_LAYERS, HIDDEN, "tokens", compat))
    routing = {routing_name(name): tensor for name, tensor in published.items() if routing_name(name)}
    load_routing_state_dict(model, {name: _without_row(name, tensor) for name, tensor in routing.items()})
    return model


def _without_row(name: str, tensor: Tensor) -> Tensor:
    """Published tokens are embeddings of one row."""
    return tensor[0] if name.startswith("router.source") else tensor


def expand_images(model: LlamaForCausalLM, input_ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings with image features (B, 6, D) in place of the marker, (B, N, D), and which positions they take."""
    rows, masks = [], []
    for ids, features in zip(input_ids, images, strict=True):
        place = (ids == IMAGE).nonzero().item()
        embeddings = model.get_input_embeddings()(ids.clamp(min=0))
        rows.append(torch.cat([embeddings[:place], features, embeddings[place + 1 :]]))
        is_image = torch.zeros(len(rows[-1]), dtype=torch.bool)
        is_image[place : place + NUM_IMAGE_TOKENS] = True
        masks.append(is_image)
    return torch.stack(rows), torch.stack(masks)


def training_batch(model: LlamaForCausalLM) -> tuple[dict[str, Any], Tensor, RoutingState]:
    """The golden batch of three conversations: inputs of the model, labels (B, N), and the state, still plain data."""
    embeddings, image_mask = expand_images(model, golden("in/input_ids"), golden("in/image_features"))
    labels, mask = golden("prep/labels")[:, NUM_TOKENS:], golden("prep/attention_mask")[:, NUM_TOKENS:]
    embeddings = embeddings * mask.unsqueeze(-1)  # as published: padding is zero, and not the padding token
    assert_close(embeddings, golden("prep/inputs_embeds")[:, NUM_TOKENS:], "inputs_embeds")
    turn_ids = torch.full(labels.shape, -1)
    for row in range(len(labels)):
        prefix = int(image_mask[row].nonzero().max()) + 1
        turn_ids[row, :prefix] = 0
        turn, was_answer = 1, False
        for place in range(prefix, int(mask[row].sum())):
            is_answer = bool(labels[row, place] != IGNORE)
            turn += was_answer and not is_answer
            turn_ids[row, place], was_answer = turn, is_answer
    question_mask = (turn_ids > 0) & (labels == IGNORE)
    state = RoutingState(turn_ids, image_mask, question_mask, "soft", num_turns=3)
    return {"inputs_embeds": embeddings, "attention_mask": mask.long()}, labels, state


def prompts(model: LlamaForCausalLM, case: str) -> tuple[dict[str, Any], RoutingState]:
    """Inputs and state of the golden prompts ``eval_b1_0`` to ``eval_b1_2`` and ``eval_b2``."""
    images = golden("in/image_features")[golden(f"{case}/image_row")]
    embeddings, image_mask = expand_images(model, golden(f"{case}/input_ids"), images)
    mask = torch.ones(image_mask.shape, dtype=torch.long)
    places = torch.arange(image_mask.shape[1])
    last_image = torch.where(image_mask, places, -1).amax(dim=1, keepdim=True)
    question_mask = places > last_image
    state = RoutingState(question_mask.long(), image_mask, question_mask, "hard", num_turns=1)
    return {"inputs_embeds": embeddings, "attention_mask": mask}, state


class Recorder:
    """Records what enters and leaves every layer, routing tokens included."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.states: dict[int, RoutingState] = {}
        for layer in find_decoder(model).layers:
            layer.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if layer.route_index not in self.inputs:
            self.inputs[layer.route_index], self.outputs[layer.route_index] = args[0], output
            self.states[layer.route_index] = kwargs["routing"]
