"""Simulated raters with known preferences: what can a plan detect, and does the analysis recover the truth?

A careful rater answers tie with probability ``tie_rate``; else the plan's first model wins with probability ``win_rate``
(two other models: one half), shifted per prompt and per rater on the logit scale by Gaussian noise, so that votes
cluster as real ones do. Independently, a vote goes to the left image unseen with probability ``left_bias``, and a
careless rater answers everything at random, checks included.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from gdmd.config.base import Config, NonNegative, Probability
from gdmd.config.load import validated
from gdmd.config.study import StudyConfig
from gdmd.reporting.progress_bar import progress_bar
from gdmd.study.analyze import NobodyPassedError, PairResult, analyze
from gdmd.study.design import draw_plan
from gdmd.study.records import ANSWERS, Answer, Plan, Prompt, Trial, Vote, vote_of


class RaterModel(Config):
    """The true preferences of simulated raters. win_rate: of the first model against each other model."""

    win_rate: Annotated[float, Field(gt=0, lt=1)] = 0.6
    tie_rate: Annotated[float, Field(ge=0, lt=1)] = 0.15
    left_bias: Probability = 0.0
    careless: Probability = 0.0
    prompt_spread: NonNegative = 0.0
    rater_spread: NonNegative = 0.0


def rater_model_of(win_rate: float, tie_rate: float, left_bias: float, careless: float, spread: float) -> RaterModel:
    """A rater model with the same spread over prompts and raters. ValueError for an impossible number."""
    fields = {"win_rate": win_rate, "tie_rate": tie_rate, "left_bias": left_bias, "careless": careless}
    fields |= {"prompt_spread": spread, "rater_spread": spread}
    model: RaterModel = validated(RaterModel, fields, "simulated raters")
    return model


@dataclass(frozen=True)
class Recovery:
    """What the analysis found in many simulated studies, for the first model against the second, first question.

    covered: share of studies whose interval contains the true value; a clustered one needs votes of two raters on two
    prompts, and studies without it do not count (NaN if none has it). found: share with sign test p < .05 on the true side.
    lost: studies without a decided vote of a rater who passed the checks; they enter no mean, and count as not found.
    """

    studies: int
    truth: float
    true_score: float
    mean_win_rate: float
    wilson_covered: float
    clustered_covered: float
    found: float
    lost: int


def simulated_votes(plan: Plan, rater_model: RaterModel, seed: int) -> list[Vote]:
    """A vote for every question of every screen of the plan. The same seed gives the same votes."""
    rng = random.Random(f"gdmd simulate {seed}")
    by_prompt = [rng.gauss(0, rater_model.prompt_spread) for _ in plan.prompts]
    votes = []
    for number, rater in enumerate(plan.raters):
        careless, shift = rng.random() < rater_model.careless, rng.gauss(0, rater_model.rater_spread)
        for trial in rater.trials:
            chance = _chance(plan, trial, rater_model, shift + by_prompt[trial.prompt])
            for question in plan.questions:
                answer = rng.choice(ANSWERS) if careless else _careful(trial, chance, rater_model, rng)
                votes.append(vote_of(plan, number, trial, question, answer, elapsed_ms=rng.randrange(2000, 9000)))
    return votes


def synthetic_plan(cfg: StudyConfig, models: Sequence[str], prompts: int) -> Plan:
    """A plan without images, for choosing the numbers of raters, prompts and pairs."""
    return draw_plan(cfg, models, [Prompt(text=f"prompt {k}") for k in range(prompts)]).plan


def recovery(plan: Plan, rater_model: RaterModel, studies: int, seed: int = 0, replicates: int = 400) -> Recovery:
    """Simulate and analyze ``studies`` studies of one plan. With spreads, the truth is averaged over the noise."""
    truth = true_win_rate(rater_model)
    score = truth * (1 - rater_model.tie_rate) + rater_model.tie_rate / 2
    score = score * (1 - rater_model.left_bias) + rater_model.left_bias / 2
    seen = (truth * (1 - rater_model.left_bias) * (1 - rater_model.tie_rate) + rater_model.left_bias / 2) / (
        (1 - rater_model.left_bias) * (1 - rater_model.tie_rate) + rater_model.left_bias
    )
    rates, wilson, found = [], 0, 0
    clustered: list[bool] = []
    with progress_bar(f"simulating {studies} studies", studies) as advance:
        for k in range(studies):
            first = _first_pair(plan, simulated_votes(plan, rater_model, seed + k), replicates, seed + k)
            advance(1)
            if first is None:
                continue
            rates.append(first.win_rate)
            wilson += first.wilson[0] <= seen <= first.wilson[1]
            if not math.isnan(first.clustered[0]):
                clustered.append(first.clustered[0] <= score <= first.clustered[1])
            found += first.p < 0.05 and (first.win_rate > 0.5) == (truth > 0.5)
    if not (count := len(rates)):
        raise ValueError(
            f"none of {studies} simulated studies has a decided vote of a rater who passed the attention checks; simulate "
            "fewer ties or careless raters, or more raters"
        )
    mean = math.fsum(rates) / count
    covered = sum(clustered) / len(clustered) if clustered else math.nan
    return Recovery(studies, seen, score, mean, wilson / count, covered, found / studies, studies - count)


def _first_pair(plan: Plan, votes: Sequence[Vote], replicates: int, seed: int) -> PairResult | None:
    """The analysis of the first two models; None without a decided vote of a rater who passed the checks."""
    try:
        first = analyze(plan, votes, replicates=replicates, seed=seed).pairs[0]
    except NobodyPassedError:
        return None
    return first if first.wins + first.losses else None


def true_win_rate(rater_model: RaterModel) -> float:
    """E[sigmoid(logit(p) + s z)], z ~ N(0, 1), s^2 = prompt_spread^2 + rater_spread^2, by the trapezoid rule."""
    spread = math.hypot(rater_model.prompt_spread, rater_model.rater_spread)
    grid = [k / 50 for k in range(-400, 401)]
    weights = [math.exp(-z * z / 2) for z in grid]
    logit = math.log(rater_model.win_rate / (1 - rater_model.win_rate))
    return math.fsum(w / (1 + math.exp(-logit - spread * z)) for w, z in zip(weights, grid, strict=True)) / sum(weights)


def _chance(plan: Plan, trial: Trial, rater_model: RaterModel, shift: float) -> float:
    """P(left wins | no tie)."""
    logit = math.log(rater_model.win_rate / (1 - rater_model.win_rate)) + shift
    chance = 1 / (1 + math.exp(-logit))
    if trial.left_model == plan.models[0]:
        return chance
    return 1 - chance if trial.right_model == plan.models[0] else 0.5


def _careful(trial: Trial, chance: float, rater_model: RaterModel, rng: random.Random) -> Answer:
    if trial.expected is not None:
        return trial.expected
    if rng.random() < rater_model.left_bias:
        return "left"
    if rng.random() < rater_model.tie_rate:
        return "tie"
    return "left" if rng.random() < chance else "right"
