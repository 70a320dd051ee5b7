"""Small-sample statistics of a comparison: t intervals, paired t tests over seeds, Holm's correction. Standard library only.

Student's t is computed from the regularized incomplete beta function,

    P(|T_v| > t) = I_x(v / 2, 1 / 2),    x = v / (v + t^2),

and I_x by its continued fraction (DLMF 8.17.22) in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
_TERMS, _CLOSE = 500, 1e-15  # of the continued fraction; it needs about sqrt(max(a, b)) terms


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
    """Two-sided paired t test of mean(a - b) = 0 over ``count`` pairs, and the 95 % interval of the difference."""

    count: int
    difference: float
    low: float
    high: float
    t: float
    p: float


def summarize(values: Sequence[float]) -> Summary:
    """mean +- t_{.975, n-1} std / sqrt(n). ValueError for no values."""
    if not values:
        raise ValueError("there are no values to summarize; give at least one seed")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile((1 + LEVEL) / 2, count - 1) * std / math.sqrt(count)
    return Summary(count, mean, std, mean - half, mean + half)


def paired_t(a: Mapping[int, float], b: Mapping[int, float]) -> PairedTest | None:
    """The test over the seeds that both sides have (seed -> value); None below two common seeds.

    Differences that are all equal have no spread: p = 0 where they differ from 0, and p = 1 where they are 0.
    """
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        return None
    found = summarize([a[seed] - b[seed] for seed in seeds])
    if found.std == 0:
        t = math.copysign(math.inf, found.mean) if found.mean else 0.0
    else:
        t = found.mean / (found.std / math.sqrt(found.count))
    return PairedTest(found.count, found.mean, found.low, found.high, t, two_sided_p(t, found.count - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: p'_(k) = max_{j <= k} min(1, (m - j + 1) p_(j)), by name, in the given order."""
    order = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def two_sided_p(t: float, dof: float) -> float:
    """P(|T| > |t|) for Student's t with ``dof`` degrees of freedom."""
    if dof <= 0:
        raise ValueError(f"Student's t needs at least one degree of freedom, got {dof}")
    if math.isinf(t):
        return 0.0
    return incomplete_beta(dof / 2, 0.5, dof / (dof + t * t))


def t_cdf(t: float, dof: float) -> float:
    """P(T <= t)."""
    tail = two_sided_p(t, dof) / 2
    return 1 - tail if t >= 0 else tail


def t_quantile(probability: float, dof: float) -> float:
    """The t with P(T <= t) = probability, by bisection to float64 precision."""
    if not 0 < probability < 1:
        raise ValueError(f"a quantile needs a probability strictly between 0 and 1, got {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, dof)
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, dof) < probability else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized I_x(a, b) of a, b > 0 and x in [0, 1]."""
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"I_x(a, b) needs a, b > 0 and x in [0, 1], got a = {a}, b = {b}, x = {x}")
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - incomplete_beta(b, a, 1 - x)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) / (a * _fraction(a, b, x))


def _fraction(a: float, b: float, x: float) -> float:
    """1 + d_1 / (1 + d_2 / (1 + ...)) of DLMF 8.17.22, by the modified Lentz method."""
    value, above, below = 1.0, 1.0, 0.0
    for n in range(1, _TERMS + 1):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        below = 1 / _not_zero(1 + term * below)
        above = _not_zero(1 + term / above)
        value *= above * below
        if abs(above * below - 1) < _CLOSE:
            return value
    raise ValueError(f"I_{x}({a}, {b}) did not converge in {_TERMS} terms; the degrees of freedom are too many")


def _not_zero(value: float) -> float:
    """Lentz's guard against a division by zero."""
    return value if abs(value) > 1e-300 else 1e-300


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
