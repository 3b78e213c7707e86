"""Promises of the image statistics: formula, range, order by detail, whose image is whose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fuzzyroe.image_statistics import CODING_STEP, EDGE_STEP, FULL_CONTRAST, coding_cost, edge_density, mean_over_images

STATISTICS = (edge_density, coding_cost)


def half_and_half(step: float) -> Tensor:
    """One 5 x 5 image: three columns at 0, two columns at ``step``."""
    return torch.tensor([0.0, 0, 0, step, step]).expand(1, 3, 5, 5)


def test_an_edge_counts_whole_from_its_step_on_and_in_proportion_below() -> None:
    for step, share in ((EDGE_STEP, 1.0), (10 * EDGE_STEP, 1.0), (-EDGE_STEP / 4, 0.25)):
        assert edge_density(half_and_half(step)).item() == pytest.approx(share / 4)  # 1 of 4 columns of gradients


def test_a_difference_costs_its_code() -> None:
    expected = math.log1p(0.7 / CODING_STEP) / math.log1p(FULL_CONTRAST / CODING_STEP) / 4
    assert coding_cost(half_and_half(0.7)).item() == pytest.approx(expected)
    checkerboard = torch.tensor([0, FULL_CONTRAST] * 4).expand(1, 3, 8, 8)
    assert coding_cost(checkerboard).item() == pytest.approx(1)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_plain_images_have_none_and_busier_ones_more(statistic) -> None:
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)
    values = [statistic(image).item() for image in (torch.full((1, 3, 32, 32), 0.8), smooth, noise, 100 * noise)]
    assert values[0] == 0 and values == sorted(values) and 1 >= values[3] > values[2] > values[1] > 0


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_pixel_shows_in_its_image_only(statistic, bad: float) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = statistic(images)
    images[1, 0, 4, 4] = bad
    values = statistic(images)
    assert not torch.isfinite(values[1]) and torch.equal(values[[0, 2]], expected[[0, 2]])
    means = mean_over_images(values, torch.tensor([4, 4, 4]))
    assert torch.equal(torch.isfinite(means), torch.tensor([True, False, True]))


def test_half_precision_pixels_change_little() -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for statistic in STATISTICS:
        rounded = statistic(images.bfloat16())
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, statistic(images), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([9, 9], [1.0, 2.0]),
        ([0, 18, 0], [0.0, 1.5, 0.0]),
        ([18, 9, 0, 9], [1.5, 3.0, 0.0, 4.0]),
        ([576 * 4], [2.5]),
    ],
)
def test_images_belong_to_rows_in_order(tokens: list[int], expected: list[float]) -> None:
    number = {2: 2, 3: 2, 4: 4, 1: 4}[len(tokens)]
    means = mean_over_images(torch.arange(1.0, number + 1), torch.tensor(tokens, dtype=torch.float32))
    assert means.tolist() == expected


def test_rows_without_any_image_have_zero() -> None:
    assert mean_over_images(torch.ones(1), torch.zeros(3)).tolist() == [0, 0, 0]
