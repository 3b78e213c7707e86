"""Promises of LLaVA's calling convention about calls that cannot be meant: each is refused, saying what to do."""

from __future__ import annotations

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava_calls import ROWS, make_call

IMAGE = torch.zeros(1, 3, 32, 32) + 1
MARKED, TEXT = torch.tensor([ROWS[0]]), torch.tensor([ROWS[1]])


@pytest.fixture
def model(tiny_llava) -> LlavaLlamaForCausalLM:
    """A dense model that speaks LLaVA's convention."""
    return LlavaLlamaForCausalLM.adopt(tiny_llava)


REFUSED = {
    "no image": ({"images": None}, "0 images meet prompts with \\[1\\] image markers .* give one image per marker"),
    "images left out": ({}, "0 images meet prompts with \\[1\\]"),
    "too many images": ({"images": IMAGE.repeat(2, 1, 1, 1)}, "2 images meet prompts with \\[1\\]"),
    "sizes of other images": (
        {"images": IMAGE, "image_sizes": [(1, 1), (2, 2)]},
        "2 image_sizes meet 1 images; give one per image",
    ),
    "pixels and images": (
        {"images": IMAGE, "pixel_values": IMAGE},
        "pixel_values came with images or image markers .* give prompts with markers and images, or expanded ids",
    ),
    "pixels for markers": ({"pixel_values": IMAGE}, "pixel_values came with images or image markers"),
    "positions": (
        {"images": IMAGE, "position_ids": torch.arange(7).unsqueeze(0)},
        "position_ids came with images",
    ),
    "one dimension": ({"images": IMAGE[0, 0]}, "images has shape \\(32, 32\\); give \\(images, 3, H, W\\)"),
    "skipping": ({"images": IMAGE, "skip_rate": 0.3}, "Skip rate 0.3 was asked of a dense checkpoint"),
}


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_call_that_fits_no_convention_is_refused(model, method: str, options: dict, message: str) -> None:
    limit = {"max_new_tokens": 2} if method == "generate" else {}
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(MARKED, **options, **limit)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGE.byte(), "images holds torch.uint8; floating-point tensors are needed. Pass PIL images through"),
        ([object()], "images holds object; floating-point tensors are needed"),
        ("image.png", "images holds str"),
    ],
)
def test_what_is_no_picture_is_refused(model, images, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model.generate(MARKED, images=images, max_new_tokens=2)


def test_an_image_without_a_marker_is_refused(model) -> None:
    with pytest.raises(ValueError, match="1 images meet prompts with \\[0\\] image markers"):
        model.generate(TEXT, images=IMAGE, max_new_tokens=2)
    with pytest.raises(ValueError, match="1 images meet prompts with \\[0\\] image markers"):
        model(TEXT, images=IMAGE)


def test_images_without_a_prompt_are_refused(model) -> None:
    embeddings = model.get_input_embeddings()(TEXT)
    for method in (model, model.generate):
        with pytest.raises(ValueError, match="Images came without a prompt; pass token ids as the first argument"):
            method(images=IMAGE)
        with pytest.raises(ValueError, match="inputs_embeds came with images"):
            method(inputs_embeds=embeddings, images=IMAGE)


def test_tiles_that_a_missing_weight_arranges_are_refused(model) -> None:
    model.config.mm_patch_merge_type = "spatial_unpad"
    with pytest.raises(ValueError, match="mm_patch_merge_type is 'spatial_unpad', .* image_aspect_ratio 'pad'"):
        model.generate(MARKED, images=[IMAGE.repeat(3, 1, 1, 1)], max_new_tokens=2)
    assert model.generate(MARKED, images=[IMAGE], max_new_tokens=2).shape == (1, 2)


def test_tiles_are_read_one_after_the_other(model) -> None:
    tiles = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one = MARKED[0].tolist()
    at = one.index(IMAGE_TOKEN_INDEX)
    three = torch.tensor([one[:at] + [IMAGE_TOKEN_INDEX] * 3 + one[at + 1 :]])
    with torch.no_grad():
        assert torch.equal(model(MARKED, images=[tiles]).logits, model(three, images=tiles).logits)


def test_a_marker_in_padding_is_no_marker(model) -> None:
    call = make_call(ROWS[:2])
    ids = call.input_ids.masked_fill(call.mask == 0, IMAGE_TOKEN_INDEX)
    with torch.no_grad():
        found, expected = model(ids, **call.llava).logits, model(call.input_ids, **call.llava).logits
    assert torch.equal(found, expected)


def test_loading_is_left_to_the_loader(model) -> None:
    with pytest.raises(TypeError, match="use llava.model.builder.load_pretrained_model, which reads them all"):
        LlavaLlamaForCausalLM.from_pretrained("anywhere")
