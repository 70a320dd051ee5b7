"""Small-sample statistics of evaluations: t intervals, paired t tests, Holm's correction, bootstraps over clusters.

Distributions and tests are scipy's, imported on first use because that takes a second. Two things are ours:

- Holm's correction, eight lines: statsmodels would bring pandas, patsy and four more packages for it.
- The bootstrap over clusters: ``scipy.stats.bootstrap`` resamples single observations and returns no weights, which the
  Bradley-Terry intervals of the human study need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
REPLICATES = 2000
ROUNDING = 12
"""Decimals of a difference; the rest is rounding."""
_BLOCK = 100  # replicates at a time: bounds memory

Floats = NDArray[np.float64]
Interval = tuple[float, float]
Scores = Mapping[tuple[int, int], float]
"""(prompt, image) -> score; NaN = not scored."""


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (n - 1) and 95 % t interval of one number per seed.

    std, low and high are NaN for a single value.
    """

    count: int
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Two-sided paired t test of mean(a - b) = 0 over ``count`` pairs, and the 95 % interval of the difference.

    low, high and t are NaN if all differences are equal.
    """

    count: int
    difference: float
    low: float
    high: float
    t: float
    p: float


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its 95 % interval over prompts; NaN if there are no scores, or one prompt only."""

    mean: float
    low: float
    high: float
    images: int
    prompts: int
    unscored: int


@dataclass(frozen=True)
class Difference:
    """mean(a - b) over the images that both have, its interval, and the share of images on which a is higher.

    A tie counts half. The interval says whether the models differ on prompts like these, not whether people would agree.
    prompts: those with such an image.
    """

    mean: float
    low: float
    high: float
    wins: float
    images: int
    prompts: int


def summarize(values: Sequence[float]) -> Summary:
    """mean +- t_{.975, n-1} std / sqrt(n). ValueError for no values."""
    if not values:
        raise ValueError("there are no values to summarize; give at least one seed")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan)
    std = stdev(values)
    half = t_quantile(count - 1) * std / math.sqrt(count)
    return Summary(count, mean, std, mean - half, mean + half)


@cache
def t_quantile(dof: int) -> float:
    """The half width of a 95 % t interval in standard errors."""
    from scipy import stats

    return float(stats.t.ppf((1 + LEVEL) / 2, dof))


def paired_t(a: Mapping[int, float], b: Mapping[int, float]) -> PairedTest | None:
    """The test over the seeds that both sides have (seed -> value); None below two common seeds.

    If all differences are equal, t is undefined: p is that of the sign test, 2^(1 - count), and 1 if they
    are 0. They are compared with ROUNDING decimals: two equal means of tasks may differ in the last bit.
    """
    from scipy import stats

    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        return None
    differences = [a[seed] - b[seed] for seed in seeds]
    found = summarize(differences)
    if len({round(one, ROUNDING) for one in differences}) == 1:
        p = 2.0 ** (1 - found.count) if round(found.mean, ROUNDING) else 1.0
        return PairedTest(found.count, found.mean, math.nan, math.nan, math.nan, p)
    t, p = map(float, stats.ttest_1samp(differences, 0.0))
    return PairedTest(found.count, found.mean, found.low, found.high, t, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p'_(k) = max_{j <= k} min(1, (m - j + 1) p_(j)), in the given order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def cluster_counts(clusters: int, replicates: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Bootstrap replicates in blocks [b, clusters]: how often each cluster is drawn, with replacement."""
    for start in range(0, replicates, _BLOCK):
        size = min(_BLOCK, replicates - start)
        drawn = rng.integers(clusters, size=(size, clusters)) + clusters * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(np.float64)


def bootstrap_means(
    values: Sequence[float] | Floats, labels: Sequence[Any], replicates: int, rng: np.random.Generator
) -> Floats:
    """[replicates]: means of ``values`` when whole clusters (values with equal ``labels``) are drawn with replacement.

    For example, images of one prompt succeed or fail together, so whole prompts are resampled. NaN for a single cluster,
    which says nothing about its spread.
    """
    _, place = np.unique(np.asarray(labels), return_inverse=True)
    if not place.any():
        return np.full(replicates, np.nan)
    total, size = np.bincount(place, np.asarray(values, dtype=np.float64)), np.bincount(place)
    return np.concatenate([(n @ total) / (n @ size) for n in cluster_counts(len(size), replicates, rng)])


def percentile_interval(replicates: Floats) -> Interval:
    """The middle 95 % of bootstrap replicates."""
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def clustered_mean(scores: Scores) -> Estimate:
    """sum_p sum_k s_pk / number of images, with prompts p drawn with replacement for the interval."""
    kept = {place: score for place, score in scores.items() if not math.isnan(score)}
    missing = len(scores) - len(kept)
    if not kept:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, missing)
    prompts = [prompt for prompt, _ in kept]
    count = len(set(prompts))
    rng = np.random.default_rng(0)
    low, high = percentile_interval(bootstrap_means(list(kept.values()), prompts, REPLICATES, rng))
    return Estimate(math.fsum(kept.values()) / len(kept), low, high, len(kept), count, missing)


def paired_difference(a: Scores, b: Scores) -> Difference:
    """Over the images that both sides have scored; with the same noise on both sides, pairs are alike."""
    both = [place for place in a if place in b and not math.isnan(a[place]) and not math.isnan(b[place])]
    found = clustered_mean({place: a[place] - b[place] for place in both})
    wins = sum((a[place] > b[place]) + 0.5 * (a[place] == b[place]) for place in both)
    share = wins / len(both) if both else math.nan
    return Difference(found.mean, found.low, found.high, share, len(both), found.prompts)


def speed(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds per image from lines of {images, seconds, first, batch, device}.

    The first batch of a process warms up and is left out. Times of different batch sizes or devices are not mixed: the
    pair that timed the most images counts. None if only warm-up was timed.
    """
    totals: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        if not row["first"]:
            total = totals.setdefault((row.get("batch"), row.get("device")), [0, 0.0])
            total[0] += row["images"]
            total[1] += row["seconds"]
    images, seconds = max(totals.values(), default=(0, 0.0), key=lambda total: total[0])
    return seconds / images if images else None
