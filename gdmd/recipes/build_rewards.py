"""Build rewards from their configs; networks are loaded on first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.config.rewards import (
    AestheticConfig,
    CallableConfig,
    ClipConfig,
    CompositeConfig,
    DeviceOptions,
    GenEvalConfig,
    HpsConfig,
    ImageRewardConfig,
    NetworkReward,
    OcrConfig,
    PickScoreConfig,
    RealRewardConfig,
    RemoteConfig,
)
from gdmd.config.run import RewardConfig, RunConfig, ShapesReward
from gdmd.models.loading import DTYPES
from gdmd.recipes.reward_identity import SHAPES_KINDS, weight_locations
from gdmd.rewards.aesthetic import Aesthetic
from gdmd.rewards.base import Placement
from gdmd.rewards.callable import CallableReward, called, imported
from gdmd.rewards.clip import ClipScore
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.geneval.colors import ColorClassifier
from gdmd.rewards.geneval.detector import Detector
from gdmd.rewards.geneval.reward import GenEvalCredit
from gdmd.rewards.hps import Hps
from gdmd.rewards.imagereward import ImageReward
from gdmd.rewards.ocr import OcrReader, OcrReward, normalized, requested_text
from gdmd.rewards.pickscore import PickScore
from gdmd.rewards.remote import RemoteScorer
from gdmd.runs.assets import asset_path, load_asset
from gdmd.shapes.rewards import PartialCredit, load_scorer
from gdmd.types import Explains, PromptBatch, Reward


def image_reward(spec: RealRewardConfig, device: str) -> Reward:
    """Build a reward of real images. ValueError for a path without weights, before anything is loaded."""
    match spec:
        case ClipConfig():
            return ClipScore.from_pretrained(spec.path, spec.revision, _placement(spec, device))
        case HpsConfig():
            return Hps.from_pretrained(spec.path, _placement(spec, device), spec.kind)
        case PickScoreConfig():
            return PickScore.from_pretrained(spec.path, spec.revision, _placement(spec, device), spec.tokenizer)
        case ImageRewardConfig():
            return ImageReward.from_pretrained(spec.path, _placement(spec, device))
        case AestheticConfig():
            return Aesthetic.from_pretrained(spec.path, spec.clip, spec.revision, _placement(spec, device))
        case GenEvalConfig():
            placement = _placement(spec, device)
            colors = ColorClassifier.from_pretrained(spec.clip, placement=placement)
            return GenEvalCredit(Detector.from_pretrained(spec.detector, placement=placement), colors)
        case OcrConfig():
            read = _custom_reader(spec.reader) if spec.reader else _ocr_reader(spec, device)
            return OcrReward(read, spec.other_text)
        case CallableConfig():
            return CallableReward.from_target(spec.target, spec.differentiable)
        case RemoteConfig():
            return RemoteScorer(spec, os.environ.get(spec.token_variable))
        case CompositeConfig():
            return Composite([Part(image_reward(p.reward, device), p.weight, p.mean, p.std) for p in spec.parts])


def require_weights(specs: Iterable[RewardConfig]) -> None:
    """ValueError for weights on a hub that are neither cached nor can be downloaded; called before training starts."""
    for spec in specs:
        for location in weight_locations(spec):
            location.require()


def reward_stats(rewards: Sequence[Reward]) -> Mapping[str, Tensor]:
    """Statistics of rewards beyond their scores, for the log: parts of composites, failures of servers."""
    stats: dict[str, Tensor] = {}
    for reward in rewards:
        if isinstance(reward, Composite):
            stats |= reward.stats() | reward_stats([part.reward for part in reward.parts])
        elif isinstance(reward, RemoteScorer | OcrReward):
            stats |= reward.stats()
    return stats


@contextmanager
def without_stats(rewards: Sequence[Reward]) -> Iterator[None]:
    """Scores that are given inside do not count in ``reward_stats``, nor in the failures that a server may have."""
    every = [part for one in rewards for part in (one, *(p.reward for p in getattr(one, "parts", ())))]
    counting = [one for one in every if isinstance(one, Composite | RemoteScorer | OcrReward)]
    before = [{key: copy(own) for key, own in vars(one).items() if isinstance(own, int | dict)} for one in counting]
    try:
        yield
    finally:
        for one, own in zip(counting, before, strict=True):
            vars(one).update(own)


def check_prompts(specs: Sequence[RewardConfig], prompts: Iterable[str]) -> None:
    """ValueError if a reward cannot score any of the prompts: OCR without a single quoted text."""
    parts = [part.reward for spec in specs if isinstance(spec, CompositeConfig) for part in spec.parts]
    if not any(isinstance(one, OcrConfig) for one in [*specs, *parts]):
        return
    if not any(normalized(requested_text(text)) for text in prompts):
        raise ValueError(
            "reward ocr needs prompts that quote a text, and no prompt quotes any; write prompts like "
            "'a sign that says \"OPEN\"', or use the shipped ones: prompts.file=text_rendering"
        )


def try_rewards(
    rewards: Sequence[Reward], size: tuple[int, int], prompt: str, meta: Mapping[str, Any] | None, device: str
) -> None:
    """Score a gray image and a noise image with each reward before training starts; raises the reward's ValueError.

    size: height and width in pixels. NaN is allowed: the reward may not apply to the prompt.
    """
    noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.full_like(noise, 0.5), noise]).to(device)
    index = torch.arange(2, device=device)
    prompts = PromptBatch(index, (prompt, prompt), index, {}, {}, meta=(meta, meta) if meta is not None else ())
    for reward in rewards:
        scores = reward.score(images.clone().requires_grad_(reward.differentiable), prompts)
        if scores.shape != (2,):
            raise ValueError(
                f"reward {reward.name} returned shape {list(scores.shape)} for 2 images; return one number per image"
            )


def reason_unscored(rewards: Sequence[Reward], name: str) -> str:
    """Why the reward ``name``, or a part of it, did not score images; "" if unknown."""
    for reward in rewards:
        parts = [part.reward for part in reward.parts] if isinstance(reward, Composite) else []
        if reward.name == name and isinstance(reward, Explains):
            return reward.unscored_because()
        if reward.name == name and parts:
            reasons = {part.name: reason_unscored([part], part.name) for part in parts}
            return "; ".join(f"{part}: {reason}" for part, reason in reasons.items() if reason)
    return ""


def _custom_reader(target: str) -> Callable[[Any], Any]:
    return partial(called, f"text reader {target}", imported(target))


def _ocr_reader(spec: OcrConfig, device: str) -> OcrReader:
    return OcrReader.from_pretrained(spec.path, spec.revision, _placement(spec, device), spec.tokens)


def _placement(spec: DeviceOptions, device: str) -> Placement:
    placement = Placement(spec.device or device, DTYPES[spec.dtype])
    if isinstance(spec, NetworkReward):
        return replace(placement, offload=spec.offload, chunk=spec.chunk)
    return placement


def scorers_of(cfg: RunConfig) -> tuple[Reward, ...]:
    """All scorers of the Shapes world, with the options of the recipe for those that it trains on; held-out last."""
    return build_rewards(scorer_specs(cfg))


def scorer_specs(cfg: RunConfig) -> list[RewardConfig]:
    """The configs of ``scorers_of``."""
    given = {spec.kind: spec for spec in cfg.rewards}
    return [given.get(kind, ShapesReward(kind=kind)) for kind in SHAPES_KINDS]


def asset_tensors(given: str | None, name: str) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a given file or a shipped asset, and its path."""
    path = Path(given) if given else asset_path(name)
    return load_asset(path).tensors, str(path)


def build_rewards(specs: Sequence[RewardConfig], device: str = "cpu") -> tuple[Reward, ...]:
    """The reward models of a recipe, in its order."""
    return tuple(_reward(spec, device) for spec in specs)


def _reward(spec: RewardConfig, device: str) -> Reward:
    match spec:
        case ShapesReward(kind="shapes_partial_credit"):
            return PartialCredit()
        case ShapesReward(kind=kind):
            return load_scorer(kind, asset_tensors(spec.asset, kind)[0]).to(device)
        case _:
            return image_reward(spec, device)
