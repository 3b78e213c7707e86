"""Promises of the vision tower under LLaVA's names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from llava.model.llava_llama import LlavaLlamaForCausalLM


@pytest.fixture
def model(tiny_llava) -> LlavaLlamaForCausalLM:
    """A model whose image processor is a name."""
    return LlavaLlamaForCausalLM.adopt(tiny_llava, image_processor="processor")


@pytest.mark.parametrize(("layer", "width"), [(-1, 32), (-2, 32), ([-2, -1], 64)])
@pytest.mark.parametrize(("strategy", "name", "count"), [("default", "patch", 16), ("full", "cls_patch", 17)])
def test_features_are_those_that_the_projector_reads(model, layer, width: int, strategy: str, name: str, count) -> None:
    model.config.vision_feature_layer, model.config.vision_feature_select_strategy = layer, strategy
    tower, images = model.get_vision_tower(), torch.randn(2, 3, 32, 32)
    read = []
    torch.nn.Linear.register_forward_pre_hook(
        model.model.multi_modal_projector.linear_1, lambda module, args: read.append(args[0])
    )
    if width == 64:
        model.model.multi_modal_projector.linear_1 = torch.nn.Linear(64, 32)
        model.model.multi_modal_projector.linear_1.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        features = tower(images)
        model.model.get_image_features(images)
    assert torch.equal(features, read[0]) and features.shape == (2, count, width)
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (width, count, 4)
    assert (tower.select_layer, tower.select_feature) == (layer, name)


def test_half_images_give_half_features(model) -> None:
    images = torch.randn(1, 3, 32, 32).half()
    tower = model.get_vision_tower()
    with torch.no_grad():
        features = tower(images)
        assert features.dtype == torch.float16
        assert torch.equal(features, tower(images.float()).half())


def test_all_else_is_the_towers_own(model) -> None:
    tower = model.get_vision_tower()
    assert tower.is_loaded and tower.image_processor == "processor"
    assert tower.vision_tower is model.model.vision_tower
    assert tower.dtype == torch.float32 and tower.config is model.config.vision_config
    assert sum(parameter.numel() for parameter in tower.parameters()) > 0
    with pytest.raises(AttributeError):
        tower.no_such_thing  # noqa: B018


def test_it_can_be_copied(model) -> None:
    tower = model.get_vision_tower()
    for twin in (copy.copy(tower), pickle.loads(pickle.dumps(tower))):
        assert twin.select_feature == tower.select_feature
