"""A hash of everything that changes a reward's scores, so that stored scores are reused only if they are still valid."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from gdmd import __version__
from gdmd.config.rewards import (
    AestheticConfig,
    CallableConfig,
    ClipConfig,
    CompositeConfig,
    GenEvalConfig,
    HpsConfig,
    ImageRewardConfig,
    OcrConfig,
    PickScoreConfig,
    RemoteConfig,
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
    HubRepo,
    converted_folder,
    locate_weights,
    weights_content,
)
from gdmd.runs.assets import asset_path
from gdmd.shapes.evaluate import HELDOUT

_NOT_HASHED = frozenset(
    ("device", "offload", "chunk", "differentiable")  # do not change scores
    + ("url", "token_variable", "timeout_s", "retries", "batch", "on_failure", "max_unscored")
    + ("path", "revision", "tokenizer", "clip", "detector", "reader", "asset", "parts")  # hashed by their content
)
"""Config fields whose values do not enter the identity. New fields do, unless they are added here."""

SHAPES_KINDS = ("shapes_clip", "shapes_pref", HELDOUT)


def scorer_identity(spec: RewardConfig) -> str:
    """A hash of everything that changes a reward's scores: settings, content of its weights, source of a function.

    If that is unknown (a hub branch that is not cached, an old server), the identity is random, so it never matches.
    RemoteError for a server that does not answer.
    """
    settings = spec.model_dump(mode="json", exclude=set(_NOT_HASHED))
    return content_hash(__version__, json.dumps(settings, sort_keys=True), *_contents(spec))


def _contents(spec: RewardConfig) -> list[str]:
    """Identities of the content behind the paths, hub ids, functions and servers of a reward."""
    match spec:
        case ShapesReward():
            return (
                [] if spec.kind == "shapes_partial_credit" else [file_hash(Path(spec.asset or asset_path(spec.kind)))]
            )
        case ClipConfig():
            return [_content(spec.path, spec.revision, CLIP_L)]
        case HpsConfig() | ImageRewardConfig():
            return [weights_content(str(converted_folder(spec.kind, spec.path)))]
        case PickScoreConfig():
            return [_content(spec.path, spec.revision, PICKSCORE), _content(spec.tokenizer, None, CLIP_H)]
        case AestheticConfig():
            head = weights_content(str(converted_folder(spec.kind, spec.path)))
            return [head, _content(spec.clip, spec.revision, CLIP_L)]
        case GenEvalConfig():
            return detector_contents(spec.detector, spec.clip)
        case OcrConfig():
            return [source_hash(spec.reader) if spec.reader else _content(spec.path, spec.revision, OCR)]
        case CallableConfig():
            return [source_hash(spec.target)]
        case RemoteConfig():
            served = RemoteScorer(spec, os.environ.get(spec.token_variable)).version().get("identities", {})
            return [str(served.get(spec.reward) or secrets.token_hex())]
        case CompositeConfig():
            return [f"{scorer_identity(p.reward)} {p.weight} {p.mean} {p.std}" for p in spec.parts]


def detector_contents(detector: str | None, clip: str | None) -> list[str]:
    """The weights of GenEval's detector and color classifier: folders or hub ids, None = the published ones."""
    return [_content(detector, None, DETECTOR), _content(clip, None, CLIP_L)]


def _content(given: str | None, revision: str | None, default: HubRepo) -> str:
    location = locate_weights(given, revision, default)
    return weights_content(location.name_or_path, location.revision)
