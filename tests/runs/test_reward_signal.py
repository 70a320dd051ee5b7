"""Rewards of a run that score nothing or give no signal, judged from its logged rows, never from a single batch."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from gdmd.methods.scorer import ScoreStats
from gdmd.runs.reward_signal import IMAGES, WINDOW, RewardSignal, findings, names

NAN = math.nan


def row(step: int, unscored: float, spread: float) -> dict[str, float]:
    return {"step": step, "scores/a/b/unscored": unscored, "scores/a/b/spread": spread}


def signal(rows: list[dict[str, float]], batch: int = IMAGES) -> RewardSignal:
    found = RewardSignal(batch)
    for one in rows:
        found.add(int(one["step"]), one)
    return found


def same(unscored: float, spread: float, steps: int) -> list[dict[str, float]]:
    return [row(step, unscored, spread) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("rows", "batch", "finished", "silent"),
    [
        (same(1, NAN, WINDOW), IMAGES, False, True),
        (same(1, NAN, WINDOW - 1), IMAGES, False, False),
        (same(1, NAN, WINDOW), 2, False, False),  # too few images
        (same(1, NAN, IMAGES // 2), 2, False, True),
        ([row(WINDOW, 1, NAN)], IMAGES, False, True),  # one row of many iterations
        (same(1, NAN, 3), 2, True, True),  # a whole run
        (same(1, NAN, 1), 2, True, False),
        ([*same(1, NAN, 10), row(11, 0.9, 0.1), *(row(step, 1, NAN) for step in range(12, 22))], IMAGES, True, False),
        (same(0.99, 0.1, 100), IMAGES, True, False),
    ],
)
def test_rewards_without_scores(rows: list[dict[str, float]], batch: int, finished: bool, silent: bool) -> None:
    assert signal(rows, batch).silent(finished) == (["a/b"] if silent else [])


@pytest.mark.parametrize(
    ("rows", "finished", "constant"),
    [
        (same(0, 0, WINDOW), False, True),
        (same(0, 0, WINDOW - 1), False, False),
        (same(0, 0, 2), True, True),
        (same(0, 0, 1), True, False),  # a batch of a discrete reward may be all 0 or all 1
        ([*same(0, 0, 10), row(11, 0, 0.5), row(12, 0, 0)], True, False),
        ([row(step, step % 2, NAN if step % 2 else 0) for step in range(1, 2 * WINDOW + 1)], False, True),
        (same(1, NAN, 100), True, False),
    ],
)
def test_rewards_with_equal_scores(rows: list[dict[str, float]], finished: bool, constant: bool) -> None:
    assert signal(rows).constant(finished) == (["a/b"] if constant else [])


@pytest.mark.parametrize(
    ("more", "flat"),
    [
        ({}, False),
        ({"weight/r_mean": 0.5, "weight/r_std": 0.0}, True),
        ({"weight/r_mean": 0.5, "weight/r_std": 1e-4}, False),
        ({"weight/r_mean": 1.0, "weight/r_std": 0.0}, False),  # every target is better than its sample
        ({"advantage/share_zero": 1.0}, True),
        ({"advantage/share_zero": 0.9}, False),
        ({"weight/effective": 4.0000004}, True),
        ({"weight/effective": 3.9996}, False),
        ({"weight/effective": 1.0}, False),  # one of the targets has all the weight
    ],
)
def test_rewards_that_tell_no_images_of_a_prompt_apart(more: dict[str, float], flat: bool) -> None:
    found = signal([one | more for one in same(0, 0.5, WINDOW)])
    assert found.no_signal(False) == found.failed(True) == flat and not found.failed(False)


def test_few_images_are_not_a_failure() -> None:
    assert not signal(same(0, 0, 3), batch=2).failed(True) and signal(same(0, 0, 16), batch=2).failed(True)
    assert not signal([*same(0, 0, 99), row(100, 0, 0.5)], batch=2).failed(True)


def test_rounding_is_not_a_spread() -> None:
    near = [one | {"reward/a/b/sample": 20.0} for one in same(0, 1e-6, 4)]
    assert signal(near).constant(True) == ["a/b"] and signal(same(0, 1e-6, 4)).constant(True) == []


def test_rewards_that_leave_out_most_images() -> None:
    assert signal(same(0.75, 0.1, WINDOW)).sparse(False) == {"a/b": 0.75}
    assert signal(same(0.5, 0.1, WINDOW)).sparse(False) == {} == signal(same(0.75, 0.1, 3)).sparse(False)


def test_state_round_trip_and_older_rows() -> None:
    older = [{"step": 5, "loss/student": 1.0}, row(7, 1, NAN)]
    found = signal(older)
    assert found.counts["a/b"].silent == 2 and RewardSignal.load(asdict(found)) == found


def test_findings_name_the_reward_and_the_problem() -> None:
    assert findings(same(1, NAN, 4), 2, 4) == [
        "Reward a/b scored no image: its samples were trained by distillation alone."
    ]
    assert findings(same(0, 0, 4), 2, 4) == ["Reward a/b gave every image the same score: no signal."]
    assert findings(same(0, 0, 4), 8, 4)[1:] == [
        "No reward told the images of a prompt apart: they were trained by distillation alone."
    ]
    assert findings(same(0.6, 0.1, 4), 2, 4) == ["Reward a/b left 60% of the images without a score."]
    assert findings(same(0.1, 0.1, 4), 2, 4) == [] == findings(same(1, NAN, 4), 2, 100)


def test_scores_of_several_calls() -> None:
    seen = ScoreStats()
    seen.add(torch.tensor([[NAN, 2.0], [NAN, NAN], [1.0, 1.0]]))
    seen.add(torch.tensor([[3.0, NAN], [NAN, NAN], [1.0, NAN]]))
    found = {name: float(value) for name, value in seen.stats(["a", "b", "c"]).items()}
    assert names(found) == ["a", "b", "c"]
    assert found["scores/a/unscored"] == 0.5 and found["scores/a/spread"] == 0.5  # |2 - 2|, |3 - 2|
    assert found["scores/b/unscored"] == 1 and math.isnan(found["scores/b/spread"])
    assert found["scores/c/unscored"] == 0.25 and found["scores/c/spread"] == 0
    assert seen.stats(["a", "b", "c"]) == {}  # nothing was asked since
    seen.add(torch.tensor([[2.0, 2.0], [5.0, 5.0], [4.0, 4.0]]))
    again = {name: float(value) for name, value in seen.stats(["a", "b", "c"]).items()}
    assert again["scores/a/spread"] == 0 and again["scores/c/spread"] == 3  # still from the first score
