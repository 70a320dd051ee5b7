"""From votes to statistics: win rates with two kinds of interval, tests, Bradley-Terry scores, agreement, bias, attention.

Repeats and attention checks are not part of any win rate. Raters who failed more checks than allowed are left out and
counted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from gdmd.config.study import Question
from gdmd.io import finite_or_none
from gdmd.reporting.statistics import Interval, holm
from gdmd.study import statistics as stats
from gdmd.study.records import Plan, Vote


@dataclass(frozen=True)
class PairResult:
    """The votes on one pair of models, for one question (and task; "" = all tasks).

    win_rate: wins of ``first`` among decided votes, with Wilson's interval; score: (wins + ties / 2) / votes with the
    interval of the bootstraps over prompts and raters; p: exact sign test, ``p_holm`` adjusted over the question's pairs.
    """

    question: Question
    task: str
    first: str
    second: str
    wins: int
    ties: int
    losses: int
    prompts: int
    raters: int
    win_rate: float
    wilson: Interval
    score: float
    clustered: Interval
    p: float
    p_holm: float

    @property
    def votes(self) -> int:
        """All votes, ties included."""
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class BradleyTerry:
    """Log scores (mean 0) with intervals over prompts and raters; ``why_not`` if there are none.

    ``degenerate``: replicates without a maximum, left out of the intervals.
    """

    question: Question
    scores: Mapping[str, float]
    intervals: Mapping[str, Interval]
    replicates: int
    degenerate: int
    why_not: str = ""


@dataclass(frozen=True)
class Agreement:
    """Between raters on the same images (alpha: Krippendorff, nominal, first / second / tie), and with oneself."""

    question: Question
    alpha: float
    pairwise: float
    shared_pairs: int
    self_same: int
    self_count: int


@dataclass(frozen=True)
class Bias:
    """Left answers among decided votes; p: exact sign test against one half."""

    question: Question
    left: int
    right: int
    share: float
    wilson: Interval
    p: float


@dataclass(frozen=True)
class RaterRow:
    """One rater: screens answered, checks passed, repeats answered alike, median time."""

    rater: int
    screens: int
    checks_passed: int
    checks: int
    median_s: float
    used: bool


@dataclass(frozen=True)
class Analysis:
    """Everything the report shows."""

    title: str
    models: tuple[str, ...]
    pairs: tuple[PairResult, ...]
    by_task: tuple[PairResult, ...]
    bradley_terry: tuple[BradleyTerry, ...]
    agreement: tuple[Agreement, ...]
    bias: tuple[Bias, ...]
    raters: tuple[RaterRow, ...]
    planned_screens: int
    answered_screens: int
    replicates: int
    max_failed_checks: int

    def json(self) -> dict[str, Any]:
        """Plain data; what was not measured is null."""
        found: dict[str, Any] = finite_or_none(asdict(self))
        return found


class NobodyPassedError(ValueError):
    """No rater passed the attention checks."""


def analyze(
    plan: Plan, votes: Sequence[Vote], max_failed_checks: int = 0, replicates: int = 2000, seed: int = 0
) -> Analysis:
    """All statistics of a study. ValueError without votes, NobodyPassedError if no rater passed the attention checks."""
    if not votes:
        raise ValueError("there are no votes yet; analyze the study after raters have voted")
    raters = _raters(plan, votes, max_failed_checks)
    used = {row.rater for row in raters if row.used}
    first = {prompt.text: k for k, prompt in reversed(list(enumerate(plan.prompts)))}
    numbers = [first[prompt.text] for prompt in plan.prompts]  # prompts of the same text are one cluster
    kept = [replace(vote, prompt=numbers[vote.prompt]) for vote in votes if vote.rater in used]
    pairs = [vote for vote in kept if vote.kind == "pair"]
    if not pairs:
        raise NobodyPassedError(
            f"no votes are left: all {len(raters)} raters failed more than {max_failed_checks} attention checks; "
            "allow more with --max-failed, and interpret the result with care"
        )
    by_models = _models_in_order(plan)
    results, by_task, fits = [], [], []
    for question in plan.questions:
        own = [vote for vote in pairs if vote.question == question]
        results += _adjusted([_pair_result(group, "", replicates, seed) for group in _grouped(own, by_models)])
        tasks = _grouped([vote for vote in own if vote.task], lambda vote: (*by_models(vote), vote.task))
        by_task += _adjusted([_pair_result(group, group[0].task, replicates, seed) for group in tasks])
        fits.append(_bradley_terry(plan, question, own, replicates // 4, seed))
    return Analysis(
        title=plan.title,
        models=plan.models,
        pairs=tuple(results),
        by_task=tuple(by_task),
        bradley_terry=tuple(fits),
        agreement=tuple(_agreement(question, kept) for question in plan.questions),
        bias=tuple(_bias(question, pairs) for question in plan.questions),
        raters=tuple(raters),
        planned_screens=sum(len(rater.trials) for rater in plan.raters),
        answered_screens=sum(row.screens for row in raters),
        replicates=replicates,
        max_failed_checks=max_failed_checks,
    )


def _models_in_order(plan: Plan) -> Callable[[Vote], tuple[int, int]]:
    """The key that sorts votes by their models' places in the plan."""
    place = {name: number for number, name in enumerate(plan.models)}
    return lambda vote: (place[vote.first], place[vote.second])


def _grouped(votes: Iterable[Vote], key: Any) -> list[list[Vote]]:
    groups: dict[Any, list[Vote]] = defaultdict(list)
    for vote in votes:
        groups[key(vote)].append(vote)
    return [groups[name] for name in sorted(groups)]


def _pair_result(votes: Sequence[Vote], task: str, replicates: int, seed: int) -> PairResult:
    wins, losses = (sum(vote.score == score for vote in votes) for score in (1.0, 0.0))
    prompts, raters = [vote.prompt for vote in votes], [vote.rater for vote in votes]
    scores = [vote.score for vote in votes]
    return PairResult(
        question=votes[0].question,
        task=task,
        first=votes[0].first,
        second=votes[0].second,
        wins=wins,
        ties=len(votes) - wins - losses,
        losses=losses,
        prompts=len(set(prompts)),
        raters=len(set(raters)),
        win_rate=wins / (wins + losses) if wins + losses else math.nan,
        wilson=stats.wilson(wins, wins + losses),
        score=math.fsum(scores) / len(scores),
        clustered=stats.bootstrap_mean(scores, prompts, raters, replicates, seed),
        p=stats.sign_test(wins, losses),
        p_holm=math.nan,
    )


def _adjusted(results: Sequence[PairResult]) -> list[PairResult]:
    adjusted = holm([result.p for result in results])
    return [replace(result, p_holm=p) for result, p in zip(results, adjusted, strict=True)]


def _bradley_terry(plan: Plan, question: Question, votes: Sequence[Vote], replicates: int, seed: int) -> BradleyTerry:
    import numpy as np

    place = {name: k for k, name in enumerate(plan.models)}
    firsts, seconds = [place[vote.first] for vote in votes], [place[vote.second] for vote in votes]
    scores = np.array([vote.score for vote in votes])
    wins = stats.win_matrix(len(place), firsts, seconds, scores.tolist())
    if not stats.has_maximum(wins):
        why = "one model (or group of models) won or lost every vote against the rest, so its score has no bound"
        if not stats.has_maximum(wins + wins.T):
            why = "one model (or group of models) has no vote against the rest"
        return BradleyTerry(question, {}, {}, 0, 0, why)
    values = stats.bradley_terry(wins)
    prompts, raters = [vote.prompt for vote in votes], [vote.rater for vote in votes]
    draws, degenerate = [], 0
    for labels in (prompts, raters, range(len(votes))):
        weights = stats.cluster_weights(labels, replicates, seed)
        drawn = np.zeros((replicates, len(place), len(place)))
        for k, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
            drawn[:, first, second] += weights[:, k] * scores[k]
            drawn[:, second, first] += weights[:, k] * (1 - scores[k])
        good = np.array([stats.has_maximum(matrix) for matrix in drawn])
        degenerate += int((~good).sum())
        draws.append(stats.bradley_terry(drawn[good]) if good.any() else values[:0, None])
    low, high = stats.two_way_interval(values, draws, min(len(set(prompts)), len(set(raters))))
    return BradleyTerry(
        question,
        {name: float(values[k]) for name, k in place.items()},
        {name: (float(low[k]), float(high[k])) for name, k in place.items()},
        3 * replicates,
        degenerate,
    )


def _agreement(question: Question, votes: Sequence[Vote]) -> Agreement:
    answers: dict[str, list[str]] = defaultdict(list)
    first_look: dict[tuple[int, str], float] = {}
    own = [vote for vote in votes if vote.question == question]
    for vote in own:
        if vote.kind == "pair":
            answers[vote.pair].append({1.0: "first", 0.0: "second"}.get(vote.score, "tie"))
            first_look[vote.rater, vote.pair] = vote.score
    again = [vote for vote in own if vote.kind == "repeat" and (vote.rater, vote.pair) in first_look]
    units = list(answers.values())
    return Agreement(
        question,
        alpha=stats.krippendorff_alpha(units),
        pairwise=stats.pairwise_agreement(units),
        shared_pairs=sum(len(unit) > 1 for unit in units),
        self_same=sum(vote.score == first_look[vote.rater, vote.pair] for vote in again),
        self_count=len(again),
    )


def _bias(question: Question, votes: Sequence[Vote]) -> Bias:
    answers = [vote.answer for vote in votes if vote.question == question]
    left, right = answers.count("left"), answers.count("right")
    share = left / (left + right) if left + right else math.nan
    return Bias(question, left, right, share, stats.wilson(left, left + right), stats.sign_test(left, right))


def _raters(plan: Plan, votes: Sequence[Vote], max_failed_checks: int) -> list[RaterRow]:
    """A check is passed if the first question was answered as expected."""
    rows = []
    for rater in sorted({vote.rater for vote in votes}):
        screens = [vote for vote in votes if vote.rater == rater and vote.question == plan.questions[0]]
        checks = [vote for vote in screens if vote.kind == "check"]
        passed = sum(vote.answer == vote.expected for vote in checks)
        seconds = median(vote.elapsed_ms for vote in screens) / 1000
        used = len(checks) - passed <= max_failed_checks
        rows.append(RaterRow(rater, len(screens), passed, len(checks), seconds, used))
    return rows
