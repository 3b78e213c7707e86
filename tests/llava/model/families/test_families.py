"""Promises of every family of base models: image positions, names both ways, parts, recipe, vision models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from launching import ROOT
from llava.model.checkpoints.contents import parameter_shapes
from llava.model.families import FAMILIES, Family, count_image_tokens, family_of, register_vision_classes
from llava.model.families.llava15 import LLAVA15
from llava.train.stages import PARTS


def config(image_size: int, patch_size: int, strategy: str = "default") -> LlavaConfig:
    vision = CLIPVisionConfig(image_size=image_size, patch_size=patch_size)
    return LlavaConfig(vision_config=vision, vision_feature_select_strategy=strategy)


@pytest.mark.parametrize(
    ("sizes", "count"), [((336, 14), 576), ((32, 8), 16), ((32, 8, "full"), 17), ((14, 14, "full"), 2)]
)
def test_one_position_per_patch_and_one_for_a_kept_class_token(sizes: tuple, count: int) -> None:
    assert count_image_tokens(config(*sizes)) == count


def test_the_count_is_what_the_model_gives(tiny_llava, image_prompts) -> None:
    features = tiny_llava.get_image_features(image_prompts["pixel_values"]).pooler_output
    assert {len(feature) for feature in features} == {count_image_tokens(tiny_llava.config)}


def test_a_patch_size_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match="Patch size 14 does not divide image size 32"):
        count_image_tokens(config(32, 14))


@pytest.fixture
def stored_shapes(tiny_llava: LlavaForConditionalGeneration) -> dict[str, tuple[int, ...]]:
    """Names in Hugging Face's files and shapes of the tiny LLaVA's weights."""
    return parameter_shapes(tiny_llava.config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_go_to_the_original_layout_and_back(family: Family, stored_shapes: dict) -> None:
    original = {name: family.original_name(name) for name in stored_shapes}
    assert len(set(original.values())) == len(stored_shapes)
    assert all(family.to_hf.rename(theirs) == name for name, theirs in original.items())
    with pytest.raises(KeyError, match="resampler.weight is no weight of"):
        family.original_name("resampler.weight")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_weight_belongs_to_a_part_that_stages_know(family: Family, stored_shapes: dict, tiny_llava) -> None:
    parts = {family.part_of(name) for name in stored_shapes}
    assert parts == {"vision_tower", "projector", "decoder"} <= set(PARTS)
    assert {family.part_of(name) for name, _ in tiny_llava.named_parameters()} == parts


def test_the_longest_prefix_decides_the_part() -> None:
    parts = {"vision_tower": ("vision_tower.",), "projector": ("multi_modal_projector.", "vision_tower.norm.")}
    family = replace(LLAVA15, trainable_parts=parts)
    assert family.part_of("model.vision_tower.norm.weight") == "projector"
    assert family.part_of("model.vision_tower.encoder.weight") == "vision_tower"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_scripts_train_as_the_recipe_says(family: Family) -> None:
    scripts = "".join((ROOT / "scripts" / "v1_5" / name).read_text() for name in ("finetune.sh", "stage.sh"))
    assert all(f"--{flag} {str(value).replace('e-0', 'e-')}" in scripts for flag, value in family.recipe.items())


def test_a_vision_model_of_a_familys_own_is_built_by_transformers() -> None:
    class EyeConfig(CLIPVisionConfig):
        model_type = "toy_eye"

    class Eye(CLIPVisionModel):
        config_class = EyeConfig

    register_vision_classes(replace(LLAVA15, vision_classes=((EyeConfig, Eye),)))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(vision_config={"model_type": "toy_eye", **sizes})
    assert type(AutoModel.from_config(config.vision_config)) is Eye


def test_a_model_of_no_family_is_named() -> None:
    with pytest.raises(ValueError, match="type llama belongs to none of LLaVA-1.5"):
        family_of(LlamaConfig())
