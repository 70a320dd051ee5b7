"""Evaluate a sampler on Shapes: ShapesEval, rewards, render fidelity, attribute coverage, diversity, speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gdmd.config.run import EvalConfig
from gdmd.data.prompts import batch_of
from gdmd.diffusion.generate import Components, Sampler, generate
from gdmd.io import finite_or_none
from gdmd.reporting.distances import frechet_distance, pairwise_distance
from gdmd.reporting.statistics import REPLICATES, bootstrap_means, percentile_interval
from gdmd.shapes.check import shapeseval, summarize
from gdmd.shapes.detect import detect
from gdmd.shapes.grammar import Split, catalog, fixed_rows
from gdmd.shapes.measures import coverage, fidelity
from gdmd.shapes.render import draw_scenes, render
from gdmd.types import Reward, TextEncoder

HELDOUT = "shapes_clip_heldout"
"""The scorer whose image features measure diversity and the Fréchet distance; never used for training."""
CHECKED = "shapes_partial_credit"
"""The reward that is a part of the checker: ShapesEval of a student that was trained on it is not unseen."""
SCORED = 256
"""Images per call of a scorer."""


class FeatureReward(Reward, Protocol):
    """A reward whose image features can be used separately."""

    def image_features(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """Results of one sampler on the fixed evaluation set; ``json`` is the public form.

    interval: 95 % prompt-cluster bootstrap of the overall ShapesEval. frechet: against real renders of the same captions.
    """

    name: str
    shapeseval: Mapping[str, float]  # overall and the six tasks
    rewards: Mapping[str, float]  # mean score by name; NaN when nothing was scored
    fidelity: float
    coverage: float
    diversity: float
    frechet: float
    nfe: int
    images_per_s: float
    images_per_s_decoded: float
    interval: tuple[float, float]
    texts: tuple[str, ...] = field(repr=False)
    images: Tensor = field(repr=False)  # [N, 3, S, S]; image i shows texts[i]
    correct: Tensor = field(repr=False)  # [N] bool

    def json(self) -> dict[str, Any]:
        """Plain data; null for a number that could not be measured (no images)."""
        names = ("shapeseval", "rewards", "fidelity", "coverage", "diversity", "frechet")
        costs = ("nfe", "images_per_s", "images_per_s_decoded", "interval")
        measured: dict[str, Any] = finite_or_none({name: getattr(self, name) for name in (*names, *costs)})
        return measured | {"images": len(self.images)}


def evaluate(
    sampler: Sampler, components: Components, cfg: EvalConfig, scorers: Sequence[Reward], split: Split = "eval"
) -> Evaluation:
    """Generate ``cfg.images`` images of each caption of the fixed set and measure them all.

    scorers: all are reported; the held-out dual encoder, whose features are used, must be among them.
    """
    _features(scorers)  # raises before any image is generated
    texts = image_captions(cfg, split)
    made = generate(sampler, components, texts, cfg.seed)
    speed = made.images_per_s, made.images_per_s_decoded
    return evaluate_images(sampler.name, made.images, components.encoder, cfg, scorers, split, sampler.nfe, speed)


def image_captions(cfg: EvalConfig, split: Split = "eval") -> tuple[str, ...]:
    """The caption of every image of an evaluation: those of the fixed set, each ``cfg.images`` times."""
    return catalog().texts(fixed_rows(split, cfg.per_task).repeat_interleave(cfg.images))


def evaluate_images(
    name: str,
    images: Tensor,
    encoder: TextEncoder,
    cfg: EvalConfig,
    scorers: Sequence[Reward],
    split: Split,
    nfe: int,
    speed: tuple[float, float] = (math.nan, math.nan),
) -> Evaluation:
    """Measure images [N, 3, S, S] of ``image_captions``, in their order. speed: images per s, without and with VAE."""
    features = _features(scorers)
    rows = fixed_rows(split, cfg.per_task).repeat_interleave(cfg.images)
    texts = image_captions(cfg, split)
    _check_finite(images, name)
    detections = detect(images)
    correct = shapeseval(detections, rows)
    task = catalog().task[rows].to(correct.device)
    reals = render(draw_scenes(rows, torch.Generator().manual_seed(cfg.seed))).to(images.device)
    seen = _in_batches(features, images)
    return Evaluation(
        name=name,
        shapeseval=summarize(correct, task),
        rewards={scorer.name: mean_score(scorer, images, texts, encoder) for scorer in scorers},
        fidelity=float(fidelity(images, detections).mean()),
        coverage=coverage(detections, rows, correct),
        diversity=pairwise_distance(seen, rows) if len(rows.unique()) < len(rows) else math.nan,  # type: ignore[no-untyped-call]
        frechet=frechet_distance(seen, _in_batches(features, reals)),
        interval=bootstrap_interval(correct, task, texts, cfg.seed),
        texts=texts,
        images=images,
        correct=correct,
        nfe=nfe,
        images_per_s=speed[0],
        images_per_s_decoded=speed[1],
    )


@torch.no_grad()
def mean_score(scorer: Reward, images: Tensor, texts: Sequence[str], encoder: TextEncoder) -> float:
    """Mean over the scored images, in batches; NaN ("not scored") is left out."""
    parts = []
    for start in range(0, len(images), SCORED):
        prompts = batch_of(tuple(texts[start : start + SCORED]), encoder)
        parts.append(scorer.score(images[start : start + SCORED], prompts).float())
    return float(torch.cat(parts).nanmean())


def bootstrap_interval(correct: Tensor, task: Tensor, texts: Sequence[str], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of task means; NaN if a task has one caption only. correct [N] bool, task [N].

    Images of one caption are correlated, so whole captions are resampled, within their task.
    """
    rng, captions = np.random.default_rng(seed), np.array(texts)
    drawn = []
    for index in task.unique().tolist():  # type: ignore[no-untyped-call]
        own = (task == index).cpu().numpy()
        drawn.append(bootstrap_means(correct.cpu().numpy()[own], captions[own], REPLICATES, rng))
    return percentile_interval(np.mean(drawn, 0))


def _features(scorers: Sequence[Reward]) -> Callable[[Tensor], Tensor]:
    for scorer in scorers:
        if scorer.name == HELDOUT:
            held: FeatureReward = scorer  # type: ignore[assignment]
            return held.image_features
    names = [scorer.name for scorer in scorers]
    raise ValueError(f"the evaluation needs the scorer {HELDOUT} for its image features, got {names}; add it")


@torch.no_grad()
def _in_batches(features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([features(part) for part in images.split(SCORED)])  # type: ignore[no-untyped-call]


def _check_finite(images: Tensor, name: str) -> None:
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(images)} images of {name!r} are not finite; the network has diverged: "
            "evaluate an earlier checkpoint or train with lower learning rates"
        )
