"""Distances between feature sets against values written out by hand or known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from gdmd.reporting.distances import cluster_spread, frechet_distance, mmd, pairwise_distance


def test_mmd_is_its_double_sum() -> None:
    a, b = torch.randn(7, 3, dtype=torch.double), torch.randn(5, 3, dtype=torch.double) + 0.5

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return math.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(x, y, strict=True)) / (2 * 2.0**2))

    def mean(u: torch.Tensor, v: torch.Tensor) -> float:
        return math.fsum(k(x, y) for x in u for y in v) / (len(u) * len(v))

    wanted = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert mmd(a, b, bandwidth=2.0, scale=10.0) == pytest.approx(10 * wanted, rel=1e-12)


def test_mmd_of_two_gaussians() -> None:
    """E k over N(0, s^2) and N(m, s^2) in one dimension: h / sqrt(h^2 + 2 s^2) exp(-m^2 / (2 (h^2 + 2 s^2)))."""
    width, shift, count = 1.5, 1.0, 20_000
    grid = (torch.arange(count, dtype=torch.double) + 0.5) / count  # quantiles instead of draws: no noise
    points = torch.special.ndtri(grid)[:: count // 1000, None]
    same, inside = width / math.sqrt(width**2 + 2), shift**2 / (2 * (width**2 + 2))
    wanted = 2 * same * (1 - math.exp(-inside))
    assert mmd(points, points + shift, bandwidth=width, scale=1.0) == pytest.approx(wanted, rel=5e-3)


def test_mmd_of_a_set_with_itself_is_zero() -> None:
    a = torch.randn(1100, 4)  # more than a block
    assert abs(mmd(a, a)) < 1e-9
    far = a.double() + 1e6  # float32, or an expanded square, would lose the distances
    assert mmd(far, far + 0.01) == pytest.approx(mmd(a.double(), a.double() + 0.01), rel=1e-3)
    with pytest.raises(ValueError, match="at least two images"):
        mmd(a[:1], a)


def test_frechet_distance_of_diagonal_covariances() -> None:
    """|m|^2 + sum_d (sigma_a - sigma_b)^2; the samples are corners, whose moments are exact."""
    corners = torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)], dtype=torch.double)
    a = corners * torch.tensor([1.0, 2.0]) * math.sqrt(3 / 4)  # N - 1 = 3: unit variance per axis
    b = corners * torch.tensor([3.0, 0.5]) * math.sqrt(3 / 4) + torch.tensor([1.0, -1.0])
    assert frechet_distance(a, b) == pytest.approx(2 + (1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-12)


def test_spread_and_pairwise_distance() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [7.0, 0.0]])
    cluster = torch.tensor([4, 4, 9, 9])
    assert cluster_spread(points, cluster) == pytest.approx((2 * math.sqrt(0.5) + 2 * 1.0) / 4, rel=1e-12)
    assert pairwise_distance(points, cluster) == pytest.approx(0.5, rel=1e-12)  # 1 - cos 90 and 1 - cos 0
