"""Reward models of real images: which, from where, on what device; and rewards made of others."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from gdmd.config.base import Config, Count, Finite, NonNegativeCount, Positive, Probability


def _function(given: str) -> str:
    """``module:function`` or ``path/to/file.py:function``."""
    module, colon, name = given.rpartition(":")
    named = module.endswith(".py") or all(part.isidentifier() for part in module.split("."))
    if colon and named and name.isidentifier():
        return given
    what = f"names a file without its function; write {given}:FUNCTION" if given.endswith(".py") else ""
    raise ValueError(
        what or "does not name a function; write module:function or path/to/file.py:function, like my_rewards.py:warm"
    )


def function_label(target: str) -> str:
    """The name of a function's scores: module:function, without the folder of a file."""
    module, _, name = target.rpartition(":")
    return f"{PurePath(module).stem}:{name}" if module.endswith(".py") else target


FunctionName = Annotated[str, AfterValidator(_function)]
"""A Python function, in a module or a file."""


class DeviceOptions(Config):
    """Device and precision of a reward's networks."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Of the weights and towers; preprocessing, cosine and head are always fp32."
    )
    device: str | None = Field(default=None, description='"cuda:1", "cpu", ...; default: where the student is.')


class NetworkReward(DeviceOptions):
    """A neural reward; its weights can be offloaded to the CPU between calls."""

    offload: bool = Field(default=False, description="Keep the weights on the CPU between calls.")
    chunk: NonNegativeCount = Field(default=0, description="Images per forward pass; 0 = the whole batch.")


class ClipReward(NetworkReward):
    """CLIPScore: the cosine, in [-1, 1]."""

    kind: Literal["clip"] = "clip"
    path: str | None = Field(default=None, description="Folder or hub id of a CLIPModel; default: ViT-L/14, pinned.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")

    @property
    def label(self) -> str:
        return self.kind


class HpsReward(NetworkReward):
    """HPSv2.1 ("hps") or HPSv2 ("hps_v2"): the cosine of their own ViT-H/14."""

    kind: Literal["hps", "hps_v2"] = "hps"
    path: str | None = Field(default=None, description="Converted folder; default: what `gdmd rewards convert` wrote.")

    @property
    def label(self) -> str:
        return self.kind


class PickScoreReward(NetworkReward):
    """PickScore v1: exp(logit_scale) times the cosine, about 15 to 27."""

    kind: Literal["pickscore"] = "pickscore"
    path: str | None = Field(default=None, description="Folder or hub id; default: the published weights, pinned.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    tokenizer: str | None = Field(default=None, description="Folder or hub id of the tokenizer; default: CLIP-H's.")

    @property
    def label(self) -> str:
        return self.kind


class ImageRewardReward(NetworkReward):
    """ImageReward v1: standardized, about -3 to 3."""

    kind: Literal["imagereward"] = "imagereward"
    path: str | None = Field(default=None, description="Converted folder; default: what `gdmd rewards convert` wrote.")

    @property
    def label(self) -> str:
        return self.kind


class AestheticReward(NetworkReward):
    """LAION aesthetic v2: reads the image alone, about 1 to 10."""

    kind: Literal["aesthetic"] = "aesthetic"
    path: str | None = Field(default=None, description="Converted folder of the head; default: the converted one.")
    clip: str | None = Field(default=None, description="Folder or hub id of CLIP ViT-L/14; default: pinned.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of clip.")

    @property
    def label(self) -> str:
        return self.kind


class GenEvalReward(DeviceOptions):
    """GenEval partial credit, in [0, 1]: not the metric. Prompts need GenEval metadata."""

    kind: Literal["geneval"] = "geneval"
    detector: str | None = Field(default=None, description="Folder or hub id of a COCO Mask2Former.")
    clip: str | None = Field(default=None, description="Folder or hub id of CLIP ViT-L/14, the color classifier.")

    @property
    def label(self) -> str:
        return self.kind


class OcrConfig(DeviceOptions):
    """OCR: 1 - edit distance / length of the text quoted in the prompt, in [0, 1]; NaN for a prompt without quotes."""

    kind: Literal["ocr"] = "ocr"
    path: str | None = Field(
        default=None, description="Folder or hub id of a reading model; default: GOT-OCR 2.0, pinned."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    reader: FunctionName | None = Field(
        default=None, description='"module:function" or "file.py:function", PIL image -> str, instead of a model.'
    )
    tokens: Count = Field(default=128, description="Longest reading of the model.")
    other_text: Literal["error", "free"] = Field(
        default="error", description="Whether text beyond the one asked for counts as an error."
    )

    @property
    def label(self) -> str:
        return self.kind

    @model_validator(mode="after")
    def _one_reader(self) -> Self:
        if self.reader is not None and (self.path is not None or self.revision is not None):
            raise ValueError(f"reader {self.reader} and a model were given; give reader, or path and revision")
        return self


class CallableConfig(Config):
    """A Python function(images, prompts) -> one number per image."""

    kind: Literal["callable"] = "callable"
    target: FunctionName = Field(
        description='"module:function" or "path/to/file.py:function"; it runs with all your rights.'
    )
    differentiable: bool = Field(default=False, description="Whether its gradient with respect to the images is right.")

    @property
    def label(self) -> str:
        return function_label(self.target)


class RemoteReward(Config):
    """A reward of another machine: ``gdmd rewards serve`` there."""

    kind: Literal["remote"] = "remote"
    url: str = Field(description="For example http://127.0.0.1:8766.")
    reward: str = Field(description="Name of one of the server's rewards.")
    token_variable: str = Field(default="GDMD_REWARD_TOKEN", description="Environment variable with the bearer token.")
    timeout_s: Positive = Field(default=60.0, description="Longest wait for one request.")
    retries: NonNegativeCount = Field(default=3, description="Further tries of a request, with growing pauses.")
    batch: Count = Field(default=8, description="Images per request.")
    on_failure: Literal["stop", "skip"] = Field(default="stop", description="skip: such images are not scored (NaN).")
    max_unscored: Probability = Field(default=0.1, description="With skip: stop above this share of all images.")

    @field_validator("url")
    @classmethod
    def _address_only(cls, url: str) -> str:
        """A config is written to the run folder and the model card: no place for a secret."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"is not an address; write http://HOST:PORT, like http://{url.strip('/') or 'HOST:8766'}")
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError(
                "should be an address only, without user, password, query or fragment; "
                "put a token into the environment variable that token_variable names"
            )
        return url

    @property
    def label(self) -> str:
        return f"remote {self.reward}"


SingleReward = Annotated[
    ClipReward
    | HpsReward
    | PickScoreReward
    | ImageRewardReward
    | AestheticReward
    | GenEvalReward
    | OcrConfig
    | CallableConfig
    | RemoteReward,
    Field(discriminator="kind"),
]


class CompositePart(Config):
    """A reward in a composite: weight x (score - mean) / std."""

    reward: SingleReward
    weight: Positive = Field(default=1.0, description="Share in the weighted mean.")
    mean: Finite = Field(default=0.0, description="Subtracted from the score; measure it on images of the teacher.")
    std: Positive = Field(default=1.0, description="The score is divided by it; measure it on images of the teacher.")


class CompositeReward(Config):
    """Several rewards as one number; every part is logged in its own units."""

    kind: Literal["composite"] = "composite"
    parts: tuple[CompositePart, ...] = Field(min_length=1, description="The rewards and how they are weighed.")

    @property
    def label(self) -> str:
        return self.kind

    @model_validator(mode="after")
    def _different(self) -> Self:
        labels = [part.reward.label for part in self.parts]
        if len(set(labels)) < len(labels):
            raise ValueError(f"each reward may be a part once, got {labels}")
        return self


ImageReward = (
    ClipReward
    | HpsReward
    | PickScoreReward
    | ImageRewardReward
    | AestheticReward
    | GenEvalReward
    | OcrConfig
    | CallableConfig
    | RemoteReward
    | CompositeReward
)
"""Every reward of real images."""

TaggedReward = Annotated[ImageReward, Field(discriminator="kind")]
"""The same, chosen by ``kind`` alone: one error for a wrong one."""
