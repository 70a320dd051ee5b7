"""Statistics of paired preferences: Wilson, sign test, two-way cluster bootstrap, Bradley-Terry, agreement.

A score is 1 (first preferred), 0 (second preferred) or 1/2 (tie). numpy float64; no other library.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]
LEVEL = 0.95
NONE: Interval = (math.nan, math.nan)
_ITERATIONS, _CLOSE = 20_000, 1e-10
_CHUNK = 250  # replicates at a time: bounds memory


def wilson(wins: int, count: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share (Wilson 1927): the p with |p_hat - p| <= z sqrt(p (1 - p) / n). NaN for n = 0.

    It takes the votes as independent: with several votes per prompt or rater, read the clustered interval beside it.
    """
    if not 0 <= wins <= count:
        raise ValueError(f"{wins} wins of {count} votes; wins must lie between 0 and the votes")
    if count == 0:
        return NONE
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = wins / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (max(0.0, middle - half), min(1.0, middle + half))


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of Binomial(wins + losses, 1/2), ties left out: min(1, 2 P(X <= min(wins, losses)))."""
    count, fewer = wins + losses, min(wins, losses)
    if fewer < 0:
        raise ValueError(f"wins and losses are counts, got {wins} and {losses}")
    whole = math.lgamma(count + 1) - count * math.log(2)
    logs = [whole - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def cluster_weights(rows: Sequence[int], columns: Sequence[int], replicates: int, seed: int) -> Floats:
    """[replicates, votes]: how often each vote is drawn when prompts and raters are both drawn with replacement.

    The pigeonhole bootstrap (Owen 2007, arXiv 0712.1111): a vote's weight is its prompt's count times its rater's,
    so votes that share a prompt or a rater rise and fall together. A single prompt or rater gives no spread.
    """
    rng = np.random.default_rng(seed)
    weights = np.ones((replicates, len(rows)))
    for labels in (rows, columns):
        names, place = np.unique(np.asarray(labels), return_inverse=True)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
        weights *= counts[:, place]
    return weights


def bootstrap_mean(
    scores: Sequence[float], rows: Sequence[int], columns: Sequence[int], replicates: int = 2000, seed: int = 0
) -> Interval:
    """95 % percentile interval of the mean score under ``cluster_weights``; NaN for no votes.

    A replicate that draws no vote at all has no mean and is left out.
    """
    if not scores:
        return NONE
    values, means = np.asarray(scores, dtype=np.float64), []
    for start in range(0, replicates, _CHUNK):
        size = min(_CHUNK, replicates - start)
        weights = cluster_weights(rows, columns, size, seed * 1_000_003 + start)
        total = weights.sum(1)
        means.append((weights @ values)[total > 0] / total[total > 0])
    return _percentiles(np.concatenate(means))


def win_matrix(models: int, firsts: Sequence[int], seconds: Sequence[int], scores: Sequence[float]) -> Floats:
    """[models, models]: row i, column j = how often i beat j; a tie is half a win for each."""
    matrix = np.zeros((models, models))
    np.add.at(matrix, (np.asarray(firsts, int), np.asarray(seconds, int)), np.asarray(scores, float))
    np.add.at(matrix, (np.asarray(seconds, int), np.asarray(firsts, int)), 1 - np.asarray(scores, float))
    return matrix


def has_strengths(wins: Floats) -> bool:
    """Ford's condition (1957): the maximum exists where no group of models lost (or won) every vote against the rest."""
    count = len(wins)
    reach = (wins > 0) | np.eye(count, dtype=bool)
    for middle in range(count):
        reach |= reach[:, middle : middle + 1] & reach[middle : middle + 1]
    return bool(reach.all())


def bradley_terry(wins: Floats) -> Floats:
    """Log strengths, mean 0, of P(i beats j) = s_i / (s_i + s_j); [..., models, models] -> [..., models].

    MM iteration (Hunter 2004, equation 3): s_i <- w_i / sum_j n_ij / (s_i + s_j). The caller asks ``has_strengths``
    first; ValueError where it has not converged.
    """
    games, total = wins + np.swapaxes(wins, -1, -2), wins.sum(-1)
    strengths = np.ones(wins.shape[:-1])
    for _ in range(_ITERATIONS):
        sums = strengths[..., :, None] + strengths[..., None, :]
        fresh = total / (games / sums).sum(-1)
        fresh /= np.exp(np.log(fresh).mean(-1, keepdims=True))
        change = np.abs(np.log(fresh / strengths)).max()
        strengths = fresh
        if change < _CLOSE:
            return np.log(strengths)
    raise ValueError("the Bradley-Terry strengths have not converged: one model wins or loses almost every vote")


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float:
    """Krippendorff's alpha for nominal answers, any number of raters per unit: 1 = agreement, 0 = chance, < 0 = worse.

        alpha = 1 - D_o / D_e,   D_o = sum_u (pairs of unequal answers in u) / (m_u - 1) / n,
        D_e = sum_{c != k} n_c n_k / (n (n - 1))

    over units with at least two answers (Krippendorff 2011, "Computing Krippendorff's alpha-reliability"). NaN where
    no unit has two answers, or all answers are the same.
    """
    counts = [Counter(unit) for unit in units if len(unit) > 1]
    totals: Counter[str] = sum(counts, Counter())
    count = totals.total()
    expected = count * count - sum(value**2 for value in totals.values())
    if count == 0 or expected == 0:
        return math.nan
    unequal = [(c.total() ** 2 - sum(v * v for v in c.values())) / (c.total() - 1) for c in counts]
    return 1 - (count - 1) * math.fsum(unequal) / expected


def fleiss_kappa(units: Sequence[Sequence[str]]) -> float:
    """Fleiss' kappa (1971) for equally many answers per unit: (P - P_e) / (1 - P_e). NaN where chance agrees always."""
    sizes = {len(unit) for unit in units}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"Fleiss' kappa needs the same number (2 or more) of answers per unit, got {sorted(sizes)}")
    (size,) = sizes
    counts = [Counter(unit) for unit in units]
    agree = [(sum(v * v for v in c.values()) - size) / (size * (size - 1)) for c in counts]
    totals: Counter[str] = sum(counts, Counter())
    chance = sum((value / (size * len(units))) ** 2 for value in totals.values())
    return math.nan if chance == 1 else (math.fsum(agree) / len(units) - chance) / (1 - chance)


def pairwise_agreement(units: Sequence[Sequence[str]]) -> float:
    """Share of pairs of raters that gave the same answer to the same unit; NaN without such a pair."""
    counts = [Counter(unit) for unit in units]
    pairs = sum(c.total() * (c.total() - 1) for c in counts)
    return sum(v * (v - 1) for c in counts for v in c.values()) / pairs if pairs else math.nan


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (1979), in the given order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def _percentiles(values: Floats) -> Interval:
    if not len(values):
        return NONE
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return (float(low), float(high))
