"""Distances between feature sets and clustered intervals against values written out by hand or known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gdmd.reporting.distances import cluster_spread, frechet_distance, mmd, pairwise_distance
from gdmd.reporting.statistics import clustered_mean, paired_difference, speed


def test_mmd_is_the_double_sum_of_its_definition() -> None:
    a, b = torch.randn(7, 3, dtype=torch.double), torch.randn(5, 3, dtype=torch.double) + 0.5

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return math.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(x, y, strict=True)) / (2 * 2.0**2))

    def mean(u: torch.Tensor, v: torch.Tensor) -> float:
        return math.fsum(k(x, y) for x in u for y in v) / (len(u) * len(v))

    wanted = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert mmd(a, b, bandwidth=2.0, scale=10.0) == pytest.approx(10 * wanted, rel=1e-12)


def test_mmd_of_two_gaussians_is_that_of_the_closed_form() -> None:
    """E k over N(0, s^2) and N(m, s^2) in one dimension: h / sqrt(h^2 + 2 s^2) exp(-m^2 / (2 (h^2 + 2 s^2)))."""
    width, shift, count = 1.5, 1.0, 20_000
    grid = (torch.arange(count, dtype=torch.double) + 0.5) / count  # quantiles instead of draws: no noise
    points = torch.special.ndtri(grid)[:: count // 1000, None]
    same, inside = width / math.sqrt(width**2 + 2), shift**2 / (2 * (width**2 + 2))
    wanted = 2 * same * (1 - math.exp(-inside))
    assert mmd(points, points + shift, bandwidth=width, scale=1.0) == pytest.approx(wanted, rel=5e-3)


def test_mmd_of_a_set_with_itself_is_zero_and_it_works_in_float64() -> None:
    a = torch.randn(1100, 4)  # more than a block
    assert abs(mmd(a, a)) < 1e-9
    far = a.double() + 1e6  # float32, or an expanded square, would lose the distances
    assert mmd(far, far + 0.01) == pytest.approx(mmd(a.double(), a.double() + 0.01), rel=1e-3)
    with pytest.raises(ValueError, match="two images or more"):
        mmd(a[:1], a)


def test_frechet_distance_of_commuting_covariances_is_the_sum_over_axes() -> None:
    """|m|^2 + sum_d (sigma_a - sigma_b)^2; the samples are corners, whose moments are exact."""
    corners = torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)], dtype=torch.double)
    a = corners * torch.tensor([1.0, 2.0]) * math.sqrt(3 / 4)  # N - 1 = 3: unit variance per axis
    b = corners * torch.tensor([3.0, 0.5]) * math.sqrt(3 / 4) + torch.tensor([1.0, -1.0])
    assert frechet_distance(a, b) == pytest.approx(2 + (1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-12)


def test_spread_and_pairwise_distance_of_two_clusters() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [7.0, 0.0]])
    cluster = torch.tensor([4, 4, 9, 9])
    assert cluster_spread(points, cluster) == pytest.approx((2 * math.sqrt(0.5) + 2 * 1.0) / 4, rel=1e-12)
    assert pairwise_distance(points, cluster) == pytest.approx(0.5, rel=1e-12)  # 1 - cos 90 and 1 - cos 0


# ---------------------------------------------------------------- means over prompts


def test_the_mean_is_over_images_and_unscored_ones_are_counted() -> None:
    found = clustered_mean({(0, 0): 1.0, (0, 1): 2.0, (1, 0): 6.0, (1, 1): math.nan})
    assert (found.mean, found.images, found.prompts, found.unscored) == (3.0, 3, 2, 1)
    assert found.low == 1.5 and found.high == 6.0
    none = clustered_mean({(0, 0): math.nan})
    assert math.isnan(none.mean) and none.unscored == 1
    assert math.isnan(clustered_mean({(0, 0): 1.0, (0, 1): 2.0}).low)  # one prompt has no interval


def test_images_of_a_prompt_are_drawn_together() -> None:
    """Four equal images per prompt: the interval is that of the 60 prompts, twice as wide as that of 240 images."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=60)
    copies = clustered_mean({(p, k): float(own[p]) for p in range(60) for k in range(4)})
    free = clustered_mean({(p * 4 + k, 0): float(own[p]) for p in range(60) for k in range(4)})
    half = 1.96 * own.std() / math.sqrt(60)
    assert (copies.high - copies.low) / 2 == pytest.approx(half, rel=0.12)
    assert (copies.high - copies.low) / (free.high - free.low) == pytest.approx(2, rel=0.12)


def test_a_paired_difference_cancels_what_both_share() -> None:
    rng = np.random.default_rng(1)
    hard = {(p, k): float(v) for p, row in enumerate(rng.normal(size=(50, 2))) for k, v in enumerate(row)}
    better = {place: value + 0.1 for place, value in hard.items()}
    better[(0, 0)], better[(0, 1)] = hard[(0, 0)], hard[(0, 1)] - 1
    found = paired_difference(better, hard)
    assert found.mean == pytest.approx((98 * 0.1 - 1) / 100) and found.wins == (98 + 0.5) / 100
    assert found.images == 100 and found.low < found.mean < found.high < 0.11


def test_speed_leaves_the_warm_up_out() -> None:
    rows = [{"images": 4, "seconds": 100.0, "first": 1}, {"images": 4, "seconds": 2.0, "first": 0}]
    assert speed(rows) == 0.5 and speed(rows[:1]) is None
