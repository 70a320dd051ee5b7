"""Statistics of paired preferences: Wilson, sign test, two-way clustered bootstrap, Bradley-Terry, agreement.

A score is 1 (first preferred), 0 (second preferred) or 1/2 (tie). numpy float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from gdmd.reporting.statistics import LEVEL, Floats, Interval, bootstrap_means, cluster_counts, t_quantile

NONE: Interval = (math.nan, math.nan)
_ITERATIONS, _CLOSE = 20_000, 1e-10


def wilson(wins: int, count: int) -> Interval:
    """Wilson's 95 % score interval of a share (Wilson 1927). NaN for no votes.

    It treats votes as independent: with several votes per prompt or rater, read the clustered interval next to it.
    """
    from scipy import stats

    if not 0 <= wins <= count:
        raise ValueError(f"{wins} wins of {count} votes; wins must be between 0 and the number of votes")
    if count == 0:
        return NONE
    found = stats.binomtest(wins, count).proportion_ci(LEVEL, "wilson")
    return float(found.low), float(found.high)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of Binomial(wins + losses, 1/2); ties are left out."""
    from scipy import stats

    if min(wins, losses) < 0:
        raise ValueError(f"wins and losses are counts, got {wins} and {losses}")
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def cluster_weights(labels: Sequence[int], replicates: int, seed: int) -> Floats:
    """[replicates, votes]: how often each vote is drawn when whole clusters (equal labels) are drawn with replacement."""
    names, place = np.unique(np.asarray(labels), return_inverse=True)
    counts = np.concatenate(list(cluster_counts(len(names), replicates, np.random.default_rng(seed))))
    weights: Floats = counts[:, place]
    return weights


def bootstrap_mean(
    scores: Sequence[float], prompts: Sequence[int], raters: Sequence[int], replicates: int = 2000, seed: int = 0
) -> Interval:
    """95 % interval of the mean score, clustered by prompt and by rater; NaN below two prompts or two raters.

    Three bootstraps (drawing prompts, raters, votes) are combined as in ``two_way_interval``. The interval is cut off
    at 0 and 1.
    """
    if not scores:
        return NONE
    draws = [
        bootstrap_means(scores, labels, replicates, np.random.default_rng((seed, k)))
        for k, labels in enumerate((prompts, raters, range(len(scores))))
    ]
    low, high = two_way_interval(np.mean(scores), draws, min(len(set(prompts)), len(set(raters))))
    return NONE if math.isnan(low) else (max(0.0, float(low)), min(1.0, float(high)))


def two_way_interval(value: Any, draws: Sequence[Floats], clusters: int) -> tuple[Any, Any]:
    """value -+ t_{.975, G - 1} sqrt(V),  V = max(V_prompt + V_rater - V_vote, V_prompt, V_rater),  G = ``clusters``.

    ``draws``: bootstrap replicates [replicates, ...] of the value with prompts, raters and votes drawn. Votes on the
    same prompt, and of the same rater, are correlated; what is counted twice is subtracted once (Cameron, Gelbach and
    Miller 2011, equation 2.11), and the maximum keeps V above either one-way variance. t, because G is often small.
    Drawing prompts and raters at once (Owen 2007, arXiv 0712.1111) would count the noise of a vote three times.
    """
    if clusters < 2 or any(len(own) < 2 for own in draws):
        return value * math.nan, value * math.nan
    by_prompt, by_rater, by_vote = (own.var(axis=0, ddof=1) for own in draws)
    variance = np.maximum(by_prompt + by_rater - by_vote, np.maximum(by_prompt, by_rater))
    half = t_quantile(clusters - 1) * np.sqrt(variance)
    return value - half, value + half


def win_matrix(models: int, firsts: Sequence[int], seconds: Sequence[int], scores: Sequence[float]) -> Floats:
    """[models, models]: row i, column j = how often i beat j; a tie is half a win for each."""
    matrix = np.zeros((models, models))
    np.add.at(matrix, (np.asarray(firsts, int), np.asarray(seconds, int)), np.asarray(scores, float))
    np.add.at(matrix, (np.asarray(seconds, int), np.asarray(firsts, int)), 1 - np.asarray(scores, float))
    return matrix


def has_maximum(wins: Floats) -> bool:
    """Whether the Bradley-Terry likelihood has one: no group of models lost, or won, every vote against the rest."""
    count = len(wins)
    reach = (wins > 0) | np.eye(count, dtype=bool)
    for middle in range(count):
        reach |= reach[:, middle : middle + 1] & reach[middle : middle + 1]
    return bool(reach.all())


def bradley_terry(wins: Floats) -> Floats:
    """Log scores, mean 0, of P(i beats j) = s_i / (s_i + s_j); [..., models, models] -> [..., models].

    MM iteration (Hunter 2004, equation 3): s_i <- w_i / sum_j n_ij / (s_i + s_j). Check ``has_maximum`` first; ValueError
    if the iteration does not converge.
    """
    games, total = wins + np.swapaxes(wins, -1, -2), wins.sum(-1)
    scores = np.ones(wins.shape[:-1])
    for _ in range(_ITERATIONS):
        sums = scores[..., :, None] + scores[..., None, :]
        fresh = total / (games / sums).sum(-1)
        fresh /= np.exp(np.log(fresh).mean(-1, keepdims=True))
        change = np.abs(np.log(fresh / scores)).max()
        scores = fresh
        if change < _CLOSE:
            return np.log(scores)
    raise ValueError("the Bradley-Terry scores have not converged: one model wins or loses almost every vote")


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float:
    """Krippendorff's alpha for nominal answers, any number of raters per unit: 1 = agreement, 0 = chance, < 0 = worse.

        alpha = 1 - D_o / D_e,   D_o = sum_u (pairs of unequal answers in u) / (m_u - 1) / n,
        D_e = sum_{c != k} n_c n_k / (n (n - 1))

    over units with at least two answers (Krippendorff 2011, "Computing Krippendorff's alpha-reliability"). NaN if
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


def pairwise_agreement(units: Sequence[Sequence[str]]) -> float:
    """Share of pairs of raters that gave the same answer to the same unit; NaN without such a pair."""
    counts = [Counter(unit) for unit in units]
    pairs = sum(c.total() * (c.total() - 1) for c in counts)
    return sum(v * (v - 1) for c in counts for v in c.values()) / pairs if pairs else math.nan
