"""Promises of the count of image positions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llava.image_tokens import count_image_tokens


def config(image_size: int, patch_size: int, strategy: str = "default") -> SimpleNamespace:
    vision = SimpleNamespace(image_size=image_size, patch_size=patch_size)
    return SimpleNamespace(vision_config=vision, vision_feature_select_strategy=strategy)


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
