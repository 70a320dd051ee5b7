"""A hash of everything that changes a reward's scores, so that stored scores are reused only if they are still valid."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from gdmd._version import __version__
from gdmd.config.rewards import (
    AestheticConfig,
    CallableConfig,
    ClipConfig,
    CompositeConfig,
    FunctionConfig,
    GenEval2Config,
    GenEvalConfig,
    HpsConfig,
    Hpsv3Config,
    ImageRewardConfig,
    OcrConfig,
    PickScoreConfig,
    RemoteConfig,
)
from gdmd.config.run import RewardConfig, ShapesReward
from gdmd.io import content_hash, file_hash
from gdmd.rewards.pickscore import tokenizer_location
from gdmd.rewards.remote import RemoteReward
from gdmd.rewards.user_code import source_hash
from gdmd.rewards.weights import (
    CLIP_L,
    DETECTOR,
    OCR,
    PICKSCORE,
    QWEN3_VL,
    WeightsLocation,
    converted_folder,
    locate_weights,
    weights_content,
)
from gdmd.runs.assets import asset_path
from gdmd.shapes.evaluate import HELDOUT

_NOT_HASHED = frozenset(
    ("device", "offload", "chunk", "differentiable")  # do not change scores
    + ("url", "token_variable", "timeout_s", "retries", "batch", "on_failure", "max_unscored")
    + (
        "path",
        "revision",
        "tokenizer",
        "clip",
        "detector",
        "reader",
        "asset",
        "parts",
        "source",
    )  # hashed by their content
)
"""Config fields whose values do not enter the identity. New fields do, unless they are added here."""

_NUMBERS = 2
"""Raise it when a reward's code gives other scores than before. 2: rotary frequencies stay fp32 in bf16 models."""

SHAPES_KINDS = ("shapes_clip", "shapes_pref", HELDOUT)


def scorer_identity(spec: RewardConfig) -> str:
    """A hash of everything that changes a reward's scores: settings, content of its weights, source of a function.

    If that is unknown (a hub branch that is not cached, an old server), the identity is random, so it never matches.
    RemoteError for a server that does not answer.
    """
    settings = spec.model_dump(mode="json", exclude=set(_NOT_HASHED))
    return content_hash(__version__, str(_NUMBERS), json.dumps(settings, sort_keys=True), *_contents(spec))


def _contents(spec: RewardConfig) -> list[str]:
    """Identities of the content behind the paths, hub ids, functions and servers of a reward."""
    match spec:
        case ShapesReward():
            shipped = spec.kind != "shapes_partial_credit"
            return [file_hash(Path(spec.asset or asset_path(spec.kind)))] if shipped else []
        case CallableConfig(target=function) | OcrConfig(reader=str(function)):
            return [source_hash(function)]
        case FunctionConfig():
            return [spec.source or secrets.token_hex()]
        case RemoteConfig():
            served = RemoteReward(**spec.model_dump()).version().get("identities", {})
            return [str(served.get(spec.reward) or secrets.token_hex())]
        case CompositeConfig():
            scales = [f"{scorer_identity(p.reward)} {p.weight} {p.mean} {p.std}" for p in spec.parts]
            return ["parts preprocess PIL images", *scales]  # earlier scores, of tensors, differ a little
        case HpsConfig() | ImageRewardConfig() | AestheticConfig() | Hpsv3Config():
            converted = [weights_content(str(converted_folder(spec.kind, spec.path)))]
        case _:
            converted = []
    return converted + [weights_content(one.name_or_path, one.revision) for one in weight_locations(spec)]


def weight_locations(spec: RewardConfig) -> list[WeightsLocation]:
    """The folders and hub ids that a reward loads as they are; converted folders are not among them."""
    match spec:
        case ClipConfig():
            return [locate_weights(spec.path, spec.revision, CLIP_L)]
        case PickScoreConfig():
            weights = locate_weights(spec.path, spec.revision, PICKSCORE)
            return [weights, tokenizer_location(weights, spec.tokenizer)]
        case AestheticConfig():
            return [locate_weights(spec.clip, spec.revision, CLIP_L)]
        case GenEval2Config():
            return [locate_weights(spec.path, spec.revision, QWEN3_VL)]
        case GenEvalConfig():
            return [locate_weights(spec.detector, None, DETECTOR), locate_weights(spec.clip, None, CLIP_L)]
        case OcrConfig(reader=None):
            return [locate_weights(spec.path, spec.revision, OCR)]
        case CompositeConfig():
            return [location for part in spec.parts for location in weight_locations(part.reward)]
    return []


def detector_contents(detector: str | None, clip: str | None) -> list[str]:
    """Identities of GenEval's detector and color classifier: folders or hub ids, None: the published ones."""
    return _contents(GenEvalConfig(detector=detector, clip=clip))
