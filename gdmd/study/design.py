"""The blind plan: which rater sees which two images, on which sides, in which order.

Pairs are spread evenly: every rater gets the same number of each model pair (to within one), half of them with the
sides swapped; every image pair gets ``votes_per_pair`` votes (to within one), or more where there are too few images;
tasks are interleaved. The same seed gives the same plan, except for image ids and tokens: those come from the system's
randomness, so that a rater who knows the seed and this file cannot tell which model made an image.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from gdmd.config.study import StudyConfig
from gdmd.study.records import Answer, Kind, Plan, Prompt, Rater, Trial, token_hash

Image = tuple[str, int, int]
"""(model, prompt, which of its images)."""
RUINED = "ruined"
"""Marks the corrupted copy of an image in an attention check."""


@dataclass(frozen=True)
class PlanWithKey:
    """A plan and what it hides: the raters' tokens, and the image behind each id (``ruined``: of corrupted copies)."""

    plan: Plan
    tokens: tuple[str, ...]
    images: Mapping[str, Image]
    ruined: Mapping[str, Image]


@dataclass(frozen=True)
class _Pair:
    first: str
    second: str
    prompt: int
    index: int

    @property
    def name(self) -> str:
        return f"{self.prompt}/{self.index}/{self.first}/{self.second}"


def draw_plan(cfg: StudyConfig, models: Sequence[str], prompts: Sequence[Prompt]) -> PlanWithKey:
    """Assign pairs, sides, repeats and checks. ValueError if the requested numbers are impossible."""
    rng = random.Random(f"gdmd study {cfg.seed}")
    model_pairs = _model_pairs(cfg, models)
    pairs = {both: _pairs(cfg, both, prompts, len(model_pairs), rng) for both in model_pairs}
    ids = _Ids()
    raters, tokens = [], []
    cursors = dict.fromkeys(model_pairs, 0)
    for rater in range(cfg.raters):
        chosen = []
        for both, count in _shares(cfg.pairs_per_rater, model_pairs, rater).items():
            own = pairs[both]
            chosen += [own[(cursors[both] + k) % len(own)] for k in range(count)]
            cursors[both] += count
        token = secrets.token_urlsafe(18)
        raters.append(Rater(token_sha256=token_hash(token), trials=_screens(cfg, chosen, ids, rng)))
        tokens.append(token)
    plan = Plan(
        title=cfg.title,
        consent=cfg.consent,
        questions=cfg.questions,
        models=tuple(models),
        prompts=tuple(prompts),
        raters=tuple(raters),
        seed=cfg.seed,
    )
    by_id = {id_: image for (image, ruined), id_ in ids.known.items() if not ruined}
    return PlanWithKey(plan, tuple(tokens), by_id, {id_: image for (image, ruined), id_ in ids.known.items() if ruined})


def votes_needed(win_rate: float) -> int:
    """Decided votes (ties do not count) that a two-sided sign test at 5 % needs to detect ``win_rate`` with 80 % power.

        n = (z_.975 / 2 + z_.8 sqrt(p (1 - p)))^2 / (p - 1/2)^2

    55 % needs 783, 60 % needs 194. With few prompts or few raters, votes are clustered and more are needed.
    """
    from statistics import NormalDist

    if not 0 < win_rate < 1 or win_rate == 0.5:
        raise ValueError(f"no number of votes shows a win rate of {win_rate}; it must be between 0 and 1, and not 0.5")
    z = NormalDist().inv_cdf
    spread = z(0.975) / 2 + z(0.8) * math.sqrt(win_rate * (1 - win_rate))
    return math.ceil((spread / (win_rate - 0.5)) ** 2)


class _Ids:
    """Random ids, one per image, that reveal nothing about it."""

    def __init__(self) -> None:
        self.known: dict[tuple[Image, bool], str] = {}

    def of(self, image: Image, ruined: bool = False) -> str:
        return self.known.setdefault((image, ruined), secrets.token_hex(12))


def _model_pairs(cfg: StudyConfig, models: Sequence[str]) -> list[tuple[str, str]]:
    if len(models) < 2 or len(set(models)) != len(models):
        raise ValueError(f"a study compares two or more different models, got {', '.join(models) or 'none'}")
    if cfg.against is None:
        return list(combinations(models, 2))
    if cfg.against not in models:
        raise ValueError(f"against names '{cfg.against}', the models are {', '.join(models)}; name one of them")
    return [both for both in combinations(models, 2) if cfg.against in both]


def _pairs(
    cfg: StudyConfig, models: tuple[str, str], prompts: Sequence[Prompt], model_pairs: int, rng: random.Random
) -> list[_Pair]:
    """As many image pairs as can get ``votes_per_pair`` votes each; tasks interleaved, every prompt before second images."""
    ordered = [
        _Pair(*models, prompt, index)
        for index in range(cfg.images_per_prompt)
        for prompt in _interleaved(prompts, rng)
    ]  # fmt: skip
    votes = cfg.raters * cfg.pairs_per_rater / model_pairs
    wanted = max(math.ceil(votes / cfg.votes_per_pair), math.ceil(cfg.pairs_per_rater / model_pairs))
    if math.ceil(cfg.pairs_per_rater / model_pairs) > len(ordered):
        raise ValueError(
            f"every rater would judge {math.ceil(cfg.pairs_per_rater / model_pairs)} pairs of {models[0]} and "
            f"{models[1]}, but there are {len(ordered)} (prompts x images per prompt); lower --pairs, or add prompts or "
            "--images"
        )
    return ordered[:wanted]


def _interleaved(prompts: Sequence[Prompt], rng: random.Random) -> list[int]:
    """A random order of the prompts in which every stretch has the tasks in about their overall proportions."""
    by_task: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_task.setdefault(prompt.task, []).append(number)
    placed = []
    for own in by_task.values():
        rng.shuffle(own)
        placed += [((place + rng.random()) / len(own), number) for place, number in enumerate(own)]
    return [number for _, number in sorted(placed)]


def _shares(count: int, model_pairs: Sequence[tuple[str, str]], rater: int) -> dict[tuple[str, str], int]:
    """``count`` split evenly over the model pairs; the remainder rotates from rater to rater."""
    base, extra = divmod(count, len(model_pairs))
    return {both: base + ((k - rater * extra) % len(model_pairs) < extra) for k, both in enumerate(model_pairs)}


def _screens(cfg: StudyConfig, chosen: list[_Pair], ids: _Ids, rng: random.Random) -> tuple[Trial, ...]:
    """Pairs in random order; repeats come from the first half, at least a quarter later; checks anywhere but first."""
    flips = _flips(chosen, rng)
    order = list(range(len(chosen)))
    rng.shuffle(order)
    screens = [(float(k), _trial("pair", chosen[i], flips[i], ids)) for k, i in enumerate(order)]
    early = range(max(cfg.repeats, math.ceil(len(order) / 2)))
    for k in rng.sample(early, cfg.repeats):
        later = min(k + max(1, len(order) // 4), len(order) - 1)
        again = _trial("repeat", chosen[order[k]], not flips[order[k]], ids)
        screens.append((rng.uniform(later, len(order) - 1) + 0.5, again))
    for _ in range(cfg.checks):
        pair = rng.choice(chosen)
        screens.append((rng.uniform(0, len(order) - 1) + 0.5, _check(pair, rng, ids)))
    return tuple(trial for _, trial in sorted(screens, key=lambda screen: screen[0]))


def _flips(chosen: Sequence[_Pair], rng: random.Random) -> list[bool]:
    """Half of each model pair with the sides swapped; of an odd number, the odd one at random."""
    places: dict[tuple[str, str], list[int]] = {}
    for place, pair in enumerate(chosen):
        places.setdefault((pair.first, pair.second), []).append(place)
    flips = [False] * len(chosen)
    for own in places.values():
        start = rng.randrange(2)
        rng.shuffle(own)
        for k, place in enumerate(own):
            flips[place] = (k + start) % 2 == 1
    return flips


def _trial(kind: Kind, pair: _Pair, flip: bool, ids: _Ids) -> Trial:
    left, right = (pair.second, pair.first) if flip else (pair.first, pair.second)
    return Trial(
        id=secrets.token_hex(12),
        kind=kind,
        pair=pair.name,
        prompt=pair.prompt,
        left=ids.of((left, pair.prompt, pair.index)),
        right=ids.of((right, pair.prompt, pair.index)),
        left_model=left,
        right_model=right,
    )


def _check(pair: _Pair, rng: random.Random, ids: _Ids) -> Trial:
    """An image next to a corrupted copy of itself: every attentive rater prefers the original."""
    model = rng.choice((pair.first, pair.second))
    image = (model, pair.prompt, pair.index)
    sides = [ids.of(image), ids.of(image, ruined=True)]
    expected: Answer = rng.choice(("left", "right"))
    left, right = sides if expected == "left" else reversed(sides)
    return Trial(
        id=secrets.token_hex(12),
        kind="check",
        pair=f"{pair.prompt}/{pair.index}/{model}/{RUINED}",
        prompt=pair.prompt,
        left=left,
        right=right,
        left_model=model,
        right_model=model,
        expected=expected,
    )
