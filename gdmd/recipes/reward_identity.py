"""A hash of everything that changes a reward's scores, so that stored scores are reused only where they hold."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from gdmd import __version__
from gdmd.config.rewards import (
    AestheticReward,
    CallableConfig,
    ClipReward,
    CompositeReward,
    GenEvalReward,
    HpsReward,
    ImageRewardReward,
    OcrConfig,
    PickScoreReward,
    RemoteReward,
)
from gdmd.config.run import RewardConfig, ShapesReward
from gdmd.io import content_hash, file_hash
from gdmd.rewards.callable import source_hash
from gdmd.rewards.remote import RemoteScorer
from gdmd.rewards.weights import (
    CLIP_H,
    CLIP_L,
    DETECTOR,
    OCR,
    PICKSCORE,
    Hub,
    converted_folder,
    place_of,
    weights_content,
)
from gdmd.runs.assets import asset_path
from gdmd.shapes.evaluate import HELDOUT

if TYPE_CHECKING:
    pass


_NOT_HASHED = frozenset(
    ("device", "offload", "chunk", "differentiable")  # where and how, not what
    + ("url", "token_variable", "timeout_s", "retries", "batch", "on_failure", "max_unscored")
    + ("path", "revision", "tokenizer", "clip", "detector", "reader", "asset", "parts")  # hashed by their content
)
"""Fields of a scorer's config that its identity does not take as they are; a field that is new counts."""


SHAPES_KINDS = ("shapes_clip", "shapes_pref", HELDOUT)


def scorer_identity(spec: RewardConfig) -> str:
    """A hash of everything that changes a scorer's result: settings, content of its weights, source of a function.

    Where that cannot be known (a hub branch that is not in the cache, an old server) the identity never equals itself.
    RemoteError for a server that does not answer.
    """
    settings = spec.model_dump(mode="json", exclude=set(_NOT_HASHED))
    return content_hash(__version__, json.dumps(settings, sort_keys=True), *_contents(spec))


def _contents(spec: RewardConfig) -> list[str]:
    """What lies behind the paths, hub ids, functions and servers of a scorer."""
    match spec:
        case ShapesReward():
            return (
                [] if spec.kind == "shapes_partial_credit" else [file_hash(Path(spec.asset or asset_path(spec.kind)))]
            )
        case ClipReward():
            return [_content(spec.path, spec.revision, CLIP_L)]
        case HpsReward() | ImageRewardReward():
            return [weights_content(str(converted_folder(spec.kind, spec.path)))]
        case PickScoreReward():
            return [_content(spec.path, spec.revision, PICKSCORE), _content(spec.tokenizer, None, CLIP_H)]
        case AestheticReward():
            head = weights_content(str(converted_folder(spec.kind, spec.path)))
            return [head, _content(spec.clip, spec.revision, CLIP_L)]
        case GenEvalReward():
            return detector_contents(spec.detector, spec.clip)
        case OcrConfig():
            return [source_hash(spec.reader) if spec.reader else _content(spec.path, spec.revision, OCR)]
        case CallableConfig():
            return [source_hash(spec.target)]
        case RemoteReward():
            served = RemoteScorer(spec, os.environ.get(spec.token_variable)).version().get("identities", {})
            return [str(served.get(spec.reward) or secrets.token_hex())]
        case CompositeReward():
            return [f"{scorer_identity(p.reward)} {p.weight} {p.mean} {p.std}" for p in spec.parts]


def detector_contents(detector: str | None, clip: str | None) -> list[str]:
    """The weights of GenEval's detector and color classifier: folders or hub ids, None = the published ones."""
    return [_content(detector, None, DETECTOR), _content(clip, None, CLIP_L)]


def _content(given: str | None, revision: str | None, default: Hub) -> str:
    place = place_of(given, revision, default)
    return weights_content(place.where, place.revision)
