"""Rewards as scorers of finished images: parsed from the command line, loaded once, applied to any image size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdmd.config.describe import labels_of
from gdmd.config.fields import kinds, models_in
from gdmd.config.image_source import SourceConfig, settings_of, split_settings
from gdmd.config.load import validated
from gdmd.config.names import listed, near
from gdmd.config.rewards import CompositeConfig, GenEval2Config, GenEvalConfig, PythonReward, RemoteConfig
from gdmd.config.run import RewardConfig, ShapesReward
from gdmd.recipes.build_rewards import build_rewards, require_weights
from gdmd.recipes.reward_identity import SHAPES_KINDS
from gdmd.rewards.base import score_images
from gdmd.rewards.clip import CLIPScore, image_embedding
from gdmd.rewards.preprocessing import from_pil
from gdmd.rewards.user_code import imported
from gdmd.shapes.evaluate import HELDOUT
from gdmd.shapes.rewards import ShapesClip, ShapesScorer
from gdmd.types import Reward

if TYPE_CHECKING:
    from PIL.Image import Image

Features = Callable[[Sequence["Image"]], Tensor]
"""Images -> features [N, D]."""


def read_scorer(text: str) -> RewardConfig:
    """``KIND[,key=value ...]``, ``module:function`` or ``file.py:function`` -> its config. ValueError for others."""
    kind, *rest = split_settings(text)
    settings = list(settings_of(rest))
    wrong = [part for part, _, value in settings if value is None]
    if wrong:
        raise ValueError(
            f"scorer {text!r}: {wrong[0]!r} is not a key=value; write KIND,key=value, for example clip,path=FOLDER, and "
            'quote a name with a comma: clip,path="a,b"'
        )
    given: dict[str, Any] = {
        key: int(value) if re.fullmatch(r"-?\d+", value) else value for _, key, value in settings if value is not None
    }
    head = {"kind": "callable", "target": kind} if ":" in kind or kind.endswith(".py") else {"kind": kind}
    config: RewardConfig = validated(RewardConfig, head | given, f"scorer {text!r}")
    return config


def read_scorers(texts: Sequence[str]) -> tuple[RewardConfig, ...]:
    """Several scorers, each once."""
    specs = tuple(read_scorer(text) for text in texts)
    labels = [spec.label for spec in specs]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(f"scorer {twice[0]} is given twice; give each once")
    return specs


def shapes_scorers() -> tuple[RewardConfig, ...]:
    """The shipped scorers of the Shapes world; no student is trained on the held-out one."""
    return tuple(ShapesReward(kind=kind) for kind in SHAPES_KINDS)  # type: ignore[arg-type]


def check_trained(sources: Sequence[SourceConfig], specs: Sequence[RewardConfig]) -> None:
    """ValueError if ``trained`` of a source names neither a scorer nor a kind of reward, so that it would mark no column."""
    labels = [label for spec in specs for label in labels_of(spec)]
    known = labels + kinds(models_in(RewardConfig))
    for source in sources:
        for label in (one for one in source.trained if one not in known):
            similar = near(label, known)
            advice = (
                f"did you mean {similar[0]!r}?" if similar else f"the scorers here are {listed(labels, last='and')}"
            )
            raise ValueError(f"source {source.where!r}: trained={label}: unknown scorer; {advice}")


def load_scorers(specs: Sequence[RewardConfig], device: str) -> dict[str, Reward]:
    """The loaded scorers by label, in the given order. ValueError for weights that are not available."""
    require_weights(specs)
    return {spec.label: reward for spec, reward in zip(specs, build_rewards(specs, device), strict=True)}


def reads_metadata(spec: RewardConfig) -> bool:
    """Whether a scorer may read a prompt's metadata, not only its text."""
    return any(isinstance(part, GenEval2Config | GenEvalConfig | PythonReward | RemoteConfig) for part in _parts(spec))


def judges_shapes(spec: RewardConfig) -> bool:
    """Whether a scorer applies to Shapes images only."""
    return any(isinstance(part, ShapesReward) for part in _parts(spec))


def may_fail(spec: RewardConfig) -> bool:
    """Whether a missing score can be due to a failure rather than the image, so that it is worth another try."""
    return any(isinstance(part, RemoteConfig) and part.on_failure == "skip" for part in _parts(spec))


def _parts(spec: RewardConfig) -> Iterator[RewardConfig]:
    """The scorer itself, or the parts of a composite."""
    if isinstance(spec, CompositeConfig):
        for part in spec.parts:
            yield from _parts(part.reward)
    else:
        yield spec


def scores_of(
    reward: Reward,
    images: Sequence[Image],
    texts: Sequence[str],
    meta: Sequence[Mapping[str, Any]],
    columns: frozenset[str] = frozenset(),
) -> list[float]:
    """One number per image, NaN = not scored. columns: names of the metadata of all prompts."""
    return score_images(reward, images, texts, meta, _device_of(reward), columns)


def _device_of(reward: Reward) -> torch.device:
    """The device of a Shapes scorer's weights; every other reward takes images on the CPU."""
    return next(reward.net.parameters()).device if isinstance(reward, ShapesScorer) else torch.device("cpu")


def feature_maker(text: str, device: str) -> Features:
    """``shapes`` (the held-out dual encoder), ``clip[,path=...]`` (unit embeddings), or ``module:function`` of images."""
    if ":" in text.split(",")[0]:
        return _checked(imported(text), text)
    name = HELDOUT if text == "shapes" else text
    (reward,) = load_scorers([read_scorer(name)], device).values()
    if features := features_by(reward):
        return _checked(features, text)
    raise ValueError(f"features {text!r}: use shapes, clip[,path=FOLDER] or module:function")


def features_by(reward: Reward) -> Features | None:
    """The image features [N, D] of a scorer; None if it has none."""
    if isinstance(reward, ShapesClip):
        return lambda images: reward.image_features(from_pil(images).to(_device_of(reward)))
    if isinstance(reward, CLIPScore):
        return lambda images: _clip_features(reward, images)
    return None


def _clip_features(reward: CLIPScore, images: Sequence[Image]) -> Tensor:
    pixels = reward.preprocess.pil(images).to(reward.placement.device, reward.placement.dtype)
    with reward.on_device:
        return image_embedding(reward.loaded.net, pixels)


def _checked(make: Any, name: str) -> Features:
    @torch.no_grad()
    def features(images: Sequence[Image]) -> Tensor:
        found = torch.as_tensor(make(list(images))).float().cpu()
        if found.ndim != 2 or len(found) != len(images) or not torch.isfinite(found).all():
            raise ValueError(
                f"features {name!r} gave {list(found.shape)} for {len(images)} images; return finite [N, D]"
            )
        return found

    return features
