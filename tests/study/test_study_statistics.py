"""Statistics of paired preferences against published examples and closed forms."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from gdmd.study import statistics as stats
from gdmd.study.design import votes_needed


def test_wilson_known_intervals() -> None:
    assert stats.wilson(60, 100) == pytest.approx((0.50200, 0.69060), abs=1e-4)
    assert stats.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert stats.wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)
    assert all(map(math.isnan, stats.wilson(0, 0)))


def test_wilson_solves_the_score_equation() -> None:
    for end in stats.wilson(13, 40):
        assert abs(13 / 40 - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / 40), rel=1e-8)


def test_sign_test_is_exact() -> None:
    assert stats.sign_test(60, 40) == pytest.approx(0.0568879, abs=1e-6)
    assert stats.sign_test(10, 0) == pytest.approx(2 / 1024)
    assert stats.sign_test(5, 5) == stats.sign_test(0, 0) == 1.0
    exact = 2 * sum(math.comb(23, k) for k in range(7)) / 2**23
    assert stats.sign_test(17, 6) == stats.sign_test(6, 17) == pytest.approx(exact, rel=1e-12)


def test_krippendorff_alpha_of_the_2011_example() -> None:
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[str(one[u]) for one in observers if one[u] is not None] for u in range(12)]
    assert stats.krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_agreement_at_chance_and_at_one() -> None:
    rng = random.Random(0)
    units = [[rng.choice("abc") for _ in range(3)] for _ in range(4000)]
    assert stats.krippendorff_alpha(units) == pytest.approx(0, abs=0.03)
    assert stats.pairwise_agreement(units) == pytest.approx(1 / 3, abs=0.02)
    assert stats.krippendorff_alpha([["a", "a"], ["b", "b"]]) == stats.pairwise_agreement([["a", "a"], ["b", "b"]]) == 1
    assert math.isnan(stats.krippendorff_alpha([["a"], ["b"]])) and math.isnan(stats.pairwise_agreement([["a"]]))


def test_bradley_terry_of_two_models() -> None:
    scores = stats.bradley_terry(np.array([[0.0, 60.0], [40.0, 0.0]]))
    assert scores[0] - scores[1] == pytest.approx(math.log(60 / 40), rel=1e-8)
    assert scores.sum() == pytest.approx(0, abs=1e-12)


def test_bradley_terry_recovers_the_true_scores() -> None:
    truth = np.array([0.8, 0.1, -0.3, -0.6])
    chances = 1 / (1 + np.exp(truth[None] - truth[:, None]))
    wins = 50 * chances * (1 - np.eye(4))
    assert stats.bradley_terry(wins) == pytest.approx(truth, abs=1e-7)
    assert stats.bradley_terry(np.stack([wins, 2 * wins]))[1] == pytest.approx(truth, abs=1e-7)


def test_no_maximum_for_a_model_that_never_lost() -> None:
    assert not stats.has_maximum(np.array([[0.0, 5.0, 3.0], [0.0, 0.0, 2.0], [0.0, 2.0, 0.0]]))
    assert stats.has_maximum(np.array([[0.0, 5.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]))


def test_a_tie_is_half_a_win() -> None:
    assert stats.win_matrix(2, [0, 0, 0], [1, 1, 1], [1.0, 0.0, 0.5]).tolist() == [[0, 1.5], [1.5, 0]]


def test_bootstrap_without_clusters_is_a_normal_interval() -> None:
    rng = np.random.default_rng(1)
    scores = (rng.random(900) < 0.6).astype(float)
    prompts, raters = np.arange(900), np.repeat(np.arange(30), 30)
    low, high = stats.bootstrap_mean(scores.tolist(), prompts.tolist(), raters.tolist(), 1000)
    normal = 2 * 1.96 * math.sqrt(0.24 / 900)
    assert 0.9 * normal < high - low < 1.5 * normal


def test_bootstrap_of_repeated_votes_counts_prompts() -> None:
    scores = [float(k % 2) for k in range(20) for _ in range(50)]
    prompts, raters = [k for k in range(20) for _ in range(50)], [r for _ in range(20) for r in range(50)]
    low, high = stats.bootstrap_mean(scores, prompts, raters, 1000)
    half = 2.093 * math.sqrt(0.25 / 20)  # t with 19 degrees of freedom; as if there were 20 votes, not 1,000
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_one_rater_has_no_clustered_interval() -> None:
    assert all(map(math.isnan, stats.bootstrap_mean([1.0, 0.0], [0, 1], [0, 0], 200)))


def test_votes_needed_to_detect_a_win_rate() -> None:
    assert (votes_needed(0.55), votes_needed(0.60), votes_needed(0.40)) == (783, 194, 194)
    with pytest.raises(ValueError, match="no number of votes"):
        votes_needed(0.5)
