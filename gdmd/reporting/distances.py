"""Distances between sets of images in the feature space of any extractor, in float64. Features are [N, D].

Name the extractor next to every number: distances of different extractors cannot be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

BANDWIDTH, SCALE = 10.0, 1000.0
"""From CMMD (arXiv 2401.09603, section 4): kernel width for unit CLIP embeddings, and the factor of the distance."""
_BLOCK = 1024


def mmd(
    features_a: Tensor,
    features_b: Tensor,
    bandwidth: float = BANDWIDTH,
    scale: float = SCALE,
) -> float:
    """scale x MMD^2 with the kernel k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)) (arXiv 2401.09603, section 4).

        MMD^2 = mean_ij k(a_i, a_j) + mean_ij k(b_i, b_j) - 2 mean_ij k(a_i, b_j)

    Pairs i = j within a side are included, as in CMMD's released code (the biased estimate, >= 0).
    """
    for side in (features_a, features_b):
        if side.ndim != 2 or len(side) < 2 or side.shape[1] != features_a.shape[1]:
            raise ValueError(
                f"mmd needs features [N, D] and [M, D] of at least two images each, got {list(features_a.shape)} and "
                f"{list(features_b.shape)}"
            )
    a, b = features_a.double(), features_b.double()
    within = _mean_kernel(a, a, bandwidth) + _mean_kernel(b, b, bandwidth)
    return scale * (within - 2 * _mean_kernel(a, b, bandwidth))


def cluster_spread(features: Tensor, cluster: Tensor) -> float:
    """Mean distance of a point to its cluster's mean (Fig. 3 of arXiv 2604.19009: lower = tighter).

    features [N, D], cluster [N] int64. Tighter is also less diverse: report ``pairwise_distance`` with it.
    """
    _, index, size = torch.unique(cluster, return_inverse=True, return_counts=True)
    own = features.double()
    center = own.new_zeros(len(size), own.shape[1]).index_add_(0, index, own) / size[:, None]
    return float((own - center[index]).norm(dim=1).mean())


def _mean_kernel(a: Tensor, b: Tensor, bandwidth: float) -> float:
    """Mean of k over all pairs, in blocks of rows. |x - y|^2 is not expanded, which would cancel digits."""
    blocks = [
        torch.exp(
            -torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * bandwidth**2)
        ).sum()
        for rows in a.split(_BLOCK)
    ]
    return float(torch.stack(blocks).sum()) / (len(a) * len(b))


def pairwise_distance(features: Tensor, group: Tensor) -> float:
    """Mean 1 - cosine over the pairs within a group, then over groups of two or more; features [N, D], group [N]."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    total = unit.new_zeros(len(size), unit.shape[1]).index_add_(0, index, unit)
    pairs = (size * (size - 1)).double()
    if not (pairs > 0).any():
        raise ValueError("pairwise_distance got only groups of one image; generate at least two images per prompt")
    own = unit.new_zeros(len(size)).index_add_(0, index, unit.square().sum(1))
    distance = 1 - (total.square().sum(1) - own)[pairs > 0] / pairs[pairs > 0]
    return float(distance.mean())


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (FID, arXiv 1706.08500, eq. 6); [N, D] and [M, D]."""
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(
            f"frechet_distance needs at least two images each, got {len(features_a)} and {len(features_b)}"
        )
    a, b = features_a.double(), features_b.double()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T  # covariances are >= 0 up to rounding
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)
