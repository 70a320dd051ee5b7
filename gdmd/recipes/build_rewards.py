"""Build rewards from their configs; networks are loaded on first use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from inspect import isclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.config.base import Config
from gdmd.config.load import validated
from gdmd.config.rewards import (
    CallableConfig,
    CompositeConfig,
    DeviceOptions,
    FunctionConfig,
    GenEval2Config,
    GenEvalConfig,
    OcrConfig,
    RealRewardConfig,
)
from gdmd.config.run import RewardConfig, RunConfig, ShapesReward
from gdmd.io import all_errors
from gdmd.recipes.reward_identity import SHAPES_KINDS, weight_locations
from gdmd.rewards.aesthetic import Aesthetic
from gdmd.rewards.base import RewardModel
from gdmd.rewards.callable import CallableReward, as_reward
from gdmd.rewards.clip import CLIPScore
from gdmd.rewards.composite import Composite, Part
from gdmd.rewards.geneval.reward import GenEval
from gdmd.rewards.geneval.rules import read_task
from gdmd.rewards.geneval2 import GenEval2, read_questions
from gdmd.rewards.hps import HPSv2
from gdmd.rewards.hpsv3 import HPSv3
from gdmd.rewards.imagereward import ImageReward
from gdmd.rewards.ocr import OCR, normalized, requested_text
from gdmd.rewards.pickscore import PickScore
from gdmd.rewards.remote import RemoteReward
from gdmd.rewards.user_code import named
from gdmd.runs.assets import asset_path, load_asset
from gdmd.shapes.rewards import PartialCredit, load_scorer
from gdmd.types import Explains, PromptBatch, Reward

log = logging.getLogger(__name__)
Functions = Mapping[str, Callable[..., Any]]
"""The Python objects that a trainer was given as rewards, by the ``name`` of their ``FunctionConfig``."""
CLASSES: Mapping[str, Callable[..., RewardModel]] = {
    "clip": CLIPScore,
    "hps": HPSv2,
    "hps_v2": HPSv2,
    "pickscore": PickScore,
    "imagereward": ImageReward,
    "aesthetic": Aesthetic,
    "hpsv3": HPSv3,
    "geneval2": GenEval2,
    "geneval": GenEval,
    "ocr": OCR,
    "remote": RemoteReward,
}
"""The class of each kind; its options are the fields of the kind's config."""


def image_reward(spec: RealRewardConfig, device: str, functions: Functions | None = None) -> RewardModel:
    """Build a reward of real images. ValueError for a path without weights, before anything is loaded."""
    match spec:
        case CompositeConfig():
            parts = [(image_reward(part.reward, device, functions), part) for part in spec.parts]
            return Composite([Part(reward, part.weight, part.mean, part.std) for reward, part in parts])
        case CallableConfig():
            return CallableReward.from_config(spec).to(device)
        case FunctionConfig():
            return CallableReward.from_config(spec, _function(spec.name, functions or {})).to(device)
        case _:
            reward = CLASSES[spec.kind](**spec.model_dump())
            return reward if isinstance(spec, DeviceOptions) and spec.device else reward.to(device)


def _function(name: str, functions: Functions) -> Callable[..., Any]:
    if name in functions:
        return functions[name]
    raise ValueError(
        f"reward {name} is a Python object that was given to DistillationTrainer in another process; continue this run "
        f"from Python with reward_funcs=[{name}], or put the function into a file and name it in the recipe: "
        "{kind: callable, target: FILE.py:FUNCTION}"
    )


def reward_specs(rewards: Iterable[Any]) -> tuple[tuple[RewardConfig, ...], dict[str, Callable[..., Any]]]:
    """The configs of reward objects, functions, kinds ("shapes_clip"), targets ("file.py:function") and configs.

    Also returns the functions among them, and among the parts of composites, by name, for ``build_rewards``.
    One ValueError for all that are something else, and for two different functions with one name.
    """
    specs: list[RewardConfig] = []
    functions: dict[str, Callable[..., Any]] = {}

    def read(given: Any) -> None:
        if isinstance(given, str):
            given = {"kind": "callable", "target": given} if ":" in given or given.endswith(".py") else {"kind": given}
        if isinstance(given, Mapping | Config):
            plain = given.model_dump() if isinstance(given, Config) else dict(given)
            specs.append(validated(RewardConfig, plain, "reward"))
            return
        reward = as_reward(given)
        if not isinstance(reward, RewardModel):
            name = given.__name__ if isclass(given) else type(given).__name__
            instead = f"give an instance, {name}()" if isclass(given) else "give a function or a reward of gdmd.rewards"
            raise ValueError(f"{name} cannot be used as a reward; {instead}")
        _check_rebuildable(reward)
        specs.append(reward.config)
        for name, function in _functions_of(reward):
            if functions.setdefault(name, function) is not function:
                raise ValueError(f"two rewards are functions named {name}; rename one of them")

    all_errors(*(partial(read, one) for one in rewards))
    return tuple(specs), functions


def _check_rebuildable(reward: Reward) -> None:
    """ValueError for networks in memory: a run loads the weights that a config names, which may be others."""
    for one in _with_parts([reward]):
        if isinstance(one, RewardModel) and one.in_memory:
            raise ValueError(
                f"reward {one.name} was built from modules in memory, and a run loads the weights that its config names; "
                "save them and give their folder as path, or give a function that calls this reward"
            )


def _functions_of(reward: Reward) -> Iterator[tuple[str, Callable[..., Any]]]:
    if isinstance(reward, CallableReward) and isinstance(reward.config, FunctionConfig):
        yield reward.name, reward.function
    for part in reward.parts if isinstance(reward, Composite) else ():
        yield from _functions_of(part.reward)


def require_weights(specs: Iterable[RewardConfig]) -> None:
    """ValueError for weights on a hub that are neither cached nor can be downloaded; called before training starts."""
    for spec in specs:
        for location in weight_locations(spec):
            location.require()


def check_functions(specs: Sequence[RewardConfig]) -> None:
    """One ValueError for all functions that a recipe names and that cannot be used; creates no object of a class."""

    def check(spec: CallableConfig) -> None:
        if not isclass(named(spec.target)):
            CallableReward.from_config(spec)

    parts = [part.reward for spec in specs if isinstance(spec, CompositeConfig) for part in spec.parts]
    all_errors(*(partial(check, one) for one in (*specs, *parts) if isinstance(one, CallableConfig)))


def reward_stats(rewards: Sequence[Reward]) -> Mapping[str, Tensor]:
    """Statistics of rewards beyond their scores, for the log: parts of composites, failures of servers."""
    stats: dict[str, Tensor] = {}
    for reward in rewards:
        if isinstance(reward, Composite):
            stats |= {**reward.stats(), **reward_stats([part.reward for part in reward.parts])}
        elif isinstance(reward, RemoteReward | OCR):
            stats |= reward.stats()
    return stats


@contextmanager
def without_stats(rewards: Sequence[Reward]) -> Iterator[None]:
    """Scores that are given inside do not count in ``reward_stats``, nor in the failures that a server may have."""
    every = [part for one in rewards for part in (one, *(p.reward for p in getattr(one, "parts", ())))]
    counting = [one for one in every if isinstance(one, Composite | RemoteReward | OCR)]
    before = [{key: copy(own) for key, own in vars(one).items() if isinstance(own, int | dict)} for one in counting]
    try:
        yield
    finally:
        for one, own in zip(counting, before, strict=True):
            vars(one).update(own)


def check_prompts(
    specs: Sequence[RewardConfig], prompts: Iterable[str], rows: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """ValueError if OCR can score none of the prompts (no quoted text), or ``check_metadata`` rejects one.

    rows: the metadata of the prompts.
    """
    kinds, texts = _kinds(specs), list(prompts)
    check_metadata(specs, texts, rows)
    if OcrConfig in kinds and not any(normalized(requested_text(text)) for text in texts):
        raise ValueError(
            "reward ocr needs prompts that quote a text, and none of the prompts does; write prompts like "
            "'a sign that says \"OPEN\"', or use the shipped ones: prompts.file=text_rendering"
        )


def check_metadata(
    specs: Sequence[RewardConfig], prompts: Sequence[str], rows: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """ValueError that names the first prompt without the metadata of GenEval, or without the questions of GenEval 2."""
    kinds = _kinds(specs)
    for text, row in zip(prompts, rows or [{}] * len(prompts), strict=True):
        if GenEval2Config in kinds:
            read_questions(text, row)
        if GenEvalConfig in kinds:
            read_task(row, f"reward geneval: prompt {text[:60]!r}")


def _kinds(specs: Sequence[RewardConfig]) -> set[type]:
    """The config classes of the rewards and of the parts of composites."""
    parts = [part.reward for spec in specs if isinstance(spec, CompositeConfig) for part in spec.parts]
    return {type(one) for one in [*specs, *parts]}


def try_rewards(
    rewards: Sequence[Reward],
    size: tuple[int, int],
    prompt: str,
    meta: Mapping[str, Any] | None,
    device: str,
    columns: frozenset[str] = frozenset(),
) -> None:
    """Score a gray image and a noise image with each reward before training starts; raises the reward's ValueError.

    size: height and width in pixels. columns: of all prompts, which ``meta`` may lack. NaN is allowed, since a reward may
    not apply to the prompt; it is reported, as are scores that differ between two calls.
    """
    noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.full_like(noise, 0.5), noise]).to(device)
    index = torch.arange(2, device=device)
    rows = (meta, meta) if meta is not None else ()
    prompts = PromptBatch(index, (prompt, prompt), index, {}, {}, meta=rows, columns=columns)
    with without_stats(rewards):
        for reward in _with_parts(rewards):
            if isinstance(reward, RemoteReward):
                reward.version()  # a clear error for a server that does not answer
            if not isinstance(reward, Composite):
                _try(reward, images, prompts)


def _with_parts(rewards: Iterable[Reward]) -> Iterator[Reward]:
    """The rewards and, after a composite, its parts."""
    for reward in rewards:
        yield reward
        if isinstance(reward, Composite):
            yield from _with_parts(part.reward for part in reward.parts)


def _try(reward: Reward, images: Tensor, prompts: PromptBatch) -> None:
    given = images.clone().requires_grad_(reward.differentiable)
    scores = reward.score(given, prompts)
    if scores.shape != (len(images),):
        raise ValueError(
            f"reward {reward.name} returned shape {list(scores.shape)} for {len(images)} images; return one number per image"
        )
    if not isinstance(reward, CallableReward):
        return
    if not torch.equal(given, images):  # through an array that shares their memory
        raise reward.modified()
    if reward.differentiable and torch.autograd.grad(scores.sum(), given, allow_unused=True)[0] is None:
        raise reward.without_gradient()
    if scores.isnan().all():
        log.warning("reward %s gave no score (NaN or None) for the prompt %r", reward.name, prompts.text[0])
    again = reward.score(images.clone(), prompts)
    if not torch.allclose(scores.detach(), again.detach(), rtol=1e-3, atol=1e-6, equal_nan=True):
        log.warning(
            "reward %s gave the same images different scores in two calls: %s, then %s",
            *(reward.name, [round(one, 4) for one in scores.tolist()], [round(one, 4) for one in again.tolist()]),
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


def scorers_of(cfg: RunConfig) -> tuple[Reward, ...]:
    """All scorers of the Shapes world, with the options of the recipe for those that it trains on; held-out last."""
    return build_rewards(scorer_specs(cfg))


def scorer_specs(cfg: RunConfig) -> list[RewardConfig]:
    """The configs of ``scorers_of``."""
    given: dict[str, RewardConfig] = {spec.kind: spec for spec in cfg.rewards}
    return [given.get(kind, ShapesReward(kind=kind)) for kind in SHAPES_KINDS]


def asset_tensors(given: str | None, name: str) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a given file or a shipped asset, and its path."""
    path = Path(given) if given else asset_path(name)
    return load_asset(path).tensors, str(path)


def build_rewards(
    specs: Sequence[RewardConfig], device: str = "cpu", functions: Functions | None = None
) -> tuple[Reward, ...]:
    """The reward models of a recipe, in its order. functions: see ``reward_specs``."""
    return tuple(_reward(spec, device, functions) for spec in specs)


def _reward(spec: RewardConfig, device: str, functions: Functions | None) -> Reward:
    match spec:
        case ShapesReward(kind="shapes_partial_credit"):
            return PartialCredit()
        case ShapesReward(kind=kind):
            return load_scorer(kind, asset_tensors(spec.asset, kind)[0]).to(device)
        case _:
            return image_reward(spec, device, functions)
