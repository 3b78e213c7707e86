"""Promises of the pruners: which tokens they keep, and what they make of the others."""

from __future__ import annotations

import pytest
import torch

from llava.model.token_pruning import PRUNERS, DominantMerged, get_pruner, spread
from llava.model.visual_tokens import VisualTokens, encode_images


def make_tokens(attention, keys=None, width: int = 2) -> VisualTokens:
    """Tokens of one image whose features are their numbers, 0, 1, 2 ..."""
    number = len(attention)
    features = torch.arange(number, dtype=torch.float32).view(1, -1, 1).expand(1, number, width)
    keys = torch.eye(number) if keys is None else torch.tensor(keys)
    return VisualTokens(features, torch.tensor([attention]), keys.float().unsqueeze(0))


def test_without_merging_the_most_attended_tokens_stay_in_order() -> None:
    tokens = make_tokens([0.1, 0.4, 0.0, 0.3, 0.2])
    assert DominantMerged(0.0)(tokens, 3)[0, :, 0].tolist() == [1, 3, 4]


def test_the_others_are_averaged_with_the_one_whose_key_is_like_theirs() -> None:
    # 0 and 5 dominate; of 1, 2, 3, 4 the middles of two parts, 2 and 4, are kept, and 1 is like 4, 3 like 2
    keys = [[9, 9], [0, 2], [1, 0], [3, 0.1], [0.1, 5], [9, 9]]
    tokens = make_tokens([0.3, 0.1, 0.1, 0.1, 0.1, 0.3], keys)
    assert DominantMerged(0.5)(tokens, 4)[0, :, 0].tolist() == [0, 2.5, 2.5, 5]


def test_merging_loses_no_token() -> None:
    tokens = make_tokens([0.0] * 8, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).tolist())
    one = VisualTokens(torch.eye(8).unsqueeze(0), tokens.class_attention, tokens.keys)
    kept = DominantMerged(0.5)(one, 4)[0]  # each row holds the weights of the tokens it is made of
    assert torch.equal(kept.sum(dim=1), torch.ones(4)) and bool(((kept > 0).sum(dim=0) == 1).all())


def test_even_tokens_are_spread_over_the_image() -> None:
    assert PRUNERS["even"](make_tokens([0.0] * 16), 4)[0, :, 0].tolist() == [2, 6, 10, 14]


@pytest.mark.parametrize("length", [1, 2, 7, 16, 576])
def test_spread_positions_differ_and_ascend(length) -> None:
    for number in range(length + 1):
        positions = spread(number, length, torch.device("cpu")).tolist()
        assert positions == sorted(set(positions)) and len(positions) == number
        assert all(0 <= position < length for position in positions)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("num_kept", [1, 2, 5, 12, 15])
def test_a_pruner_gives_the_asked_number_and_looks_at_one_image_at_a_time(
    tiny_llava, image_prompts, name, num_kept
) -> None:
    tokens = encode_images(tiny_llava.model, image_prompts["pixel_values"])
    together = get_pruner(name)(tokens, num_kept)
    alone = torch.cat([get_pruner(name)(tokens.select(torch.tensor([image])), num_kept) for image in range(2)])
    assert together.shape == (2, num_kept, tiny_llava.config.text_config.hidden_size)
    assert together.dtype == tokens.features.dtype
    torch.testing.assert_close(together, alone)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(KeyError, match="dominant_merged, even"):
        get_pruner("best")
    with pytest.raises(ValueError, match="merged_share is 1.0"):
        DominantMerged(1.0)
