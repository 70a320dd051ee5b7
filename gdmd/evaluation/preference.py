"""Scores of images as means with intervals over prompts, and paired differences between models.

Images of one prompt are not independent, so whole prompts are drawn again (cluster bootstrap, 95 % percentile interval).
An image that was not scored (NaN) is left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REPLICATES, LEVEL = 2000, 0.95
_BLOCK = 100
Scores = Mapping[tuple[int, int], float]
"""(prompt, image) -> score; NaN = not scored."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its 95 % interval over prompts; NaN where there is none (no score, one prompt)."""

    mean: float
    low: float
    high: float
    images: int
    prompts: int
    unscored: int


@dataclass(frozen=True)
class Difference:
    """mean(a - b) over the images that both have, its interval, and the share of images on which a is higher.

    A tie counts half. The interval says whether the models differ on prompts like these, not whether people would.
    """

    mean: float
    low: float
    high: float
    wins: float
    images: int


def clustered_mean(scores: Scores, seed: int = 0, replicates: int = REPLICATES) -> Estimate:
    """sum_p sum_k s_pk / number of images, with prompts p drawn with replacement for the interval."""
    kept = {place: score for place, score in scores.items() if not math.isnan(score)}
    missing = len(scores) - len(kept)
    if not kept:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, missing)
    prompts = sorted({prompt for prompt, _ in kept})
    place = {prompt: k for k, prompt in enumerate(prompts)}
    total, count = np.zeros(len(prompts)), np.zeros(len(prompts))
    for (prompt, _), score in kept.items():
        total[place[prompt]] += score
        count[place[prompt]] += 1
    low, high = _interval(total, count, seed, replicates)
    mean = math.fsum(kept.values()) / len(kept)
    return Estimate(mean, low, high, len(kept), len(prompts), missing)


def paired_difference(a: Scores, b: Scores, seed: int = 0) -> Difference:
    """Over the places that both have scored; same noise on both sides makes the pairs alike."""
    both = [place for place in a if place in b and not math.isnan(a[place]) and not math.isnan(b[place])]
    found = clustered_mean({place: a[place] - b[place] for place in both}, seed)
    wins = sum((a[place] > b[place]) + 0.5 * (a[place] == b[place]) for place in both)
    return Difference(found.mean, found.low, found.high, wins / len(both) if both else math.nan, len(both))


def speed(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds per image from lines of {images, seconds, first, batch, device}.

    The first batch of a process warms up and is left out. Times of different batch sizes or devices are not mixed: those
    of the pair that timed most images count. None where nothing but warm-up was timed.
    """
    totals: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        if not row["first"]:
            total = totals.setdefault((row.get("batch"), row.get("device")), [0, 0.0])
            total[0] += row["images"]
            total[1] += row["seconds"]
    images, seconds = max(totals.values(), default=(0, 0.0), key=lambda total: total[0])
    return seconds / images if images else None


def _interval(total: np.ndarray, count: np.ndarray, seed: int, replicates: int) -> tuple[float, float]:
    if len(total) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(0, replicates, _BLOCK):
        drawn = rng.integers(len(total), size=(_BLOCK, len(total)))
        means.append(total[drawn].sum(1) / count[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
