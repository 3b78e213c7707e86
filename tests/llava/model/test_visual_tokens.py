"""Promises of encoded images: the model's own features, with the attention that the tower really paid."""

from __future__ import annotations

import pytest
import torch

from llava.model.visual_tokens import encode_images


@pytest.mark.parametrize("layer", [-1, -2, 1, [-2, -1]])
@torch.no_grad()
def test_class_attention_is_that_of_the_layer_the_features_come_from(tiny_llava, image_prompts, layer) -> None:
    config = tiny_llava.config
    config.vision_feature_layer = layer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(tiny_llava)(config).eval()
    pixel_values = image_prompts["pixel_values"]
    tokens = encode_images(model.model, pixel_values)
    model.set_attn_implementation({"vision_config": "eager"})
    output = model.model.vision_tower(pixel_values, output_attentions=True, output_hidden_states=True)
    chosen = layer if isinstance(layer, int) else layer[-1]
    producer = (chosen if chosen >= 0 else chosen + len(output.hidden_states)) - 1
    expected = output.attentions[producer][:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(tokens.class_attention, expected, atol=1e-6, rtol=1e-5)
    keys = model.model.vision_tower.encoder.layers[producer].self_attn.k_proj(
        model.model.vision_tower.encoder.layers[producer].layer_norm1(output.hidden_states[producer])
    )
    torch.testing.assert_close(tokens.keys, keys.unflatten(-1, (4, 8)).mean(dim=2)[:, 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_are_the_model_s_own_and_no_hook_stays(tiny_llava, image_prompts) -> None:
    tokens = encode_images(tiny_llava.model, image_prompts["pixel_values"])
    expected = tiny_llava.get_image_features(image_prompts["pixel_values"]).pooler_output
    assert torch.equal(tokens.features, torch.stack(list(expected)))
    attention = tiny_llava.model.vision_tower.encoder.layers[-2].self_attn
    assert not attention.q_proj._forward_hooks and not attention.k_proj._forward_hooks


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("vision_feature_select_strategy", "full", "'default'"), ("vision_feature_layer", 0, "before the first layer")],
)
def test_towers_without_evidence_are_refused(tiny_llava, image_prompts, name, value, message) -> None:
    setattr(tiny_llava.config, name, value)
    with pytest.raises(ValueError, match=message):
        encode_images(tiny_llava.model, image_prompts["pixel_values"])


def test_another_kind_of_tower_is_refused(tiny_llava, image_prompts) -> None:
    tiny_llava.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="siglip_vision_model"):
        encode_images(tiny_llava.model, image_prompts["pixel_values"])
