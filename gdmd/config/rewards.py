"""Rewards of real images: which model, its weights and device; functions, servers, and composites of rewards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator

from gdmd.config.base import Config, Count, DeviceName, Finite, NonNegativeCount, Positive, Probability


def _function(given: str) -> str:
    """``module:function`` or ``path/to/file.py:function``."""
    module, colon, name = given.rpartition(":")
    named = module.endswith(".py") or all(part.isidentifier() for part in module.split("."))
    if colon and named and name.isidentifier():
        return given
    without = f"names a file without its function; write {given}:FUNCTION" if given.endswith(".py") else ""
    raise ValueError(
        without
        or "does not name a function; write module:function or path/to/file.py:function, like my_rewards.py:warm"
    )


def function_label(target: str) -> str:
    """Label of a function: module:function, without the folder of a file."""
    module, _, name = target.rpartition(":")
    return f"{PurePath(module).stem}:{name}" if module.endswith(".py") else target


FunctionName = Annotated[str, AfterValidator(_function)]
"""A Python function, in a module or a file."""


class LabeledByKind(Config):
    """A reward that logs and tables name by its kind."""

    if TYPE_CHECKING:
        kind: str

    @property
    def label(self) -> str:
        return self.kind


class DeviceOptions(LabeledByKind):
    """Precision and device of a neural reward."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Precision of weights and encoders; preprocessing, cosine and head are always fp32."
    )
    device: DeviceName | None = Field(
        default=None, description='Device, such as "cuda:1" or "cpu"; default: the student\'s.'
    )


class NetworkReward(DeviceOptions):
    """A neural reward; its weights can be offloaded to the CPU between calls."""

    offload: bool = Field(
        default=False, description="Keep the weights on the CPU between calls: less GPU memory, slower calls."
    )
    chunk: NonNegativeCount = Field(default=0, description="Images per forward pass; 0 = the whole batch.")


class ClipConfig(NetworkReward):
    """CLIPScore: the cosine, in [-1, 1]."""

    kind: Literal["clip"] = "clip"
    path: str | None = Field(
        default=None, description="Folder or hub id of a CLIPModel; default: ViT-L/14 at a pinned commit."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub id.")


class HpsConfig(NetworkReward):
    """HPSv2.1 ("hps") or HPSv2 ("hps_v2"): the cosine of a fine-tuned CLIP ViT-H/14."""

    kind: Literal["hps", "hps_v2"] = "hps"
    path: str | None = Field(
        default=None, description="Folder of converted weights; default: the output of `gdmd rewards convert`."
    )


class PickScoreConfig(NetworkReward):
    """PickScore v1: exp(logit_scale) times the cosine, about 15 to 27."""

    kind: Literal["pickscore"] = "pickscore"
    path: str | None = Field(
        default=None, description="Folder or hub id; default: the published weights at a pinned commit."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    tokenizer: str | None = Field(
        default=None, description="Folder or hub id of the tokenizer; default: that of CLIP ViT-H/14."
    )


class ImageRewardConfig(NetworkReward):
    """ImageReward v1: a standardized score, about -3 to 3."""

    kind: Literal["imagereward"] = "imagereward"
    path: str | None = Field(
        default=None, description="Folder of converted weights; default: the output of `gdmd rewards convert`."
    )


class AestheticConfig(NetworkReward):
    """LAION aesthetic predictor v2: scores the image without the prompt, about 1 to 10."""

    kind: Literal["aesthetic"] = "aesthetic"
    path: str | None = Field(
        default=None, description="Folder of the converted head; default: the output of `gdmd rewards convert`."
    )
    clip: str | None = Field(
        default=None,
        description="Folder or hub id of CLIP ViT-L/14; default: the published weights at a pinned commit.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of clip.")


class Hpsv3Config(NetworkReward):
    """HPSv3: the mean preference of a tuned Qwen2-VL-7B, about -5 to 15. 16 GB of weights in bf16."""

    kind: Literal["hpsv3"] = "hpsv3"
    path: str | None = Field(
        default=None, description="Folder of converted weights; default: the output of `gdmd rewards convert`."
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="bf16",
        description="Precision of the backbone, bf16 as published; preprocessing and head are always fp32.",
    )


class GenEval2Config(NetworkReward):
    """GenEval 2 (Soft-TIFA): probabilities of right answers, in [0, 1]. Prompts need questions. 18 GB of weights in bf16."""

    kind: Literal["geneval2"] = "geneval2"
    path: str | None = Field(
        default=None, description="Folder or hub id of a Qwen3-VL; default: Qwen3-VL-8B-Instruct at a pinned commit."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    mean: Literal["geometric", "arithmetic"] = Field(
        default="geometric",
        description="Mean over the questions of a prompt: geometric (all parts must be right, the paper's prompt-level "
        "score) or arithmetic (share of right parts, its atom-level score).",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="bf16",
        description="Precision of the model, bf16 as published; preprocessing and softmax are always fp32.",
    )
    chunk: NonNegativeCount = Field(
        default=1, description="Images per forward pass, with all their questions; 0 = the whole batch."
    )


class GenEvalConfig(DeviceOptions):
    """GenEval partial credit, in [0, 1]; not the GenEval metric. Prompts need GenEval metadata."""

    kind: Literal["geneval"] = "geneval"
    detector: str | None = Field(
        default=None, description="Folder or hub id of a Mask2Former for COCO; default: the published weights."
    )
    clip: str | None = Field(
        default=None,
        description="Folder or hub id of CLIP ViT-L/14, which classifies colors; default: the published weights.",
    )


class OcrConfig(DeviceOptions):
    """OCR: 1 - edit distance / length of the text quoted in the prompt, in [0, 1]; a prompt without quotes is not scored."""

    kind: Literal["ocr"] = "ocr"
    path: str | None = Field(
        default=None, description="Folder or hub id of an OCR model; default: GOT-OCR 2.0 at a pinned commit."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    reader: FunctionName | None = Field(
        default=None,
        description='Function "module:function" or "file.py:function", PIL image -> str, used instead of a model.',
    )
    tokens: Count = Field(default=128, description="Maximum number of tokens that the model reads.")
    other_text: Literal["error", "free"] = Field(
        default="error", description="Whether text that the prompt does not ask for counts as an error."
    )

    def _mistakes(self) -> Iterator[str]:
        if self.reader is not None and (self.path is not None or self.revision is not None):
            yield f"reader {self.reader} and a model were given; give reader, or path and revision"


class PythonReward(Config):
    """A reward computed by the user's Python code."""

    differentiable: bool | None = Field(
        default=None,
        description="Whether the function returns a tensor with a correct gradient with respect to the images; "
        "default: the function's attribute differentiable, else false.",
    )
    image_type: Literal["tensor", "pil"] | None = Field(
        default=None,
        description="What the function gets as images: a tensor [B, 3, H, W] in [0, 1], or a list of PIL images; "
        "default: the function's attribute image_type, else tensor.",
    )

    def _mistakes(self) -> Iterator[str]:
        if self.differentiable and self.image_type == "pil":
            yield "image_type pil carries no gradient; set image_type to tensor, or differentiable to false"


class CallableConfig(PythonReward):
    """A Python function (images, prompts, **columns) -> one number per image."""

    kind: Literal["callable"] = "callable"
    target: FunctionName = Field(
        description='"module:function" or "path/to/file.py:function", or a class, which is instantiated without '
        "arguments. The code runs with all your permissions."
    )

    @property
    def label(self) -> str:
        return function_label(self.target)


class FunctionConfig(PythonReward):
    """A Python function or other callable that was given to DistillationTrainer as an object."""

    kind: Literal["function"] = "function"
    name: str = Field(
        min_length=1, pattern=r"^[^/]+$", description="Its name, under which the trainer was given the object."
    )
    source: str | None = Field(default=None, description="Hash of its source code, if Python knows it.")

    @property
    def label(self) -> str:
        return self.name


class RemoteConfig(Config):
    """A reward computed on another machine, by ``gdmd rewards serve``."""

    kind: Literal["remote"] = "remote"
    url: str = Field(description="Address of the server, for example http://127.0.0.1:8766.")
    reward: str = Field(description="Name of one of the server's rewards.")
    token_variable: str = Field(
        default="GDMD_REWARD_TOKEN", description="Environment variable that holds the bearer token."
    )
    timeout_s: Positive = Field(default=60.0, description="Seconds to wait for one request.")
    retries: NonNegativeCount = Field(default=3, description="Retries of a failed request, with growing pauses.")
    batch: Count = Field(default=8, description="Images per request.")
    on_failure: Literal["stop", "skip"] = Field(
        default="stop",
        description="On a request that failed after all retries: stop, or leave its images unscored (NaN).",
    )
    max_unscored: Probability = Field(
        default=0.1, description="With on_failure = skip: stop if more than this share of all images is unscored."
    )

    @field_validator("url")
    @classmethod
    def _address_only(cls, url: str) -> str:
        """A config is written to the run folder and the model card, so it must not hold a secret."""
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
    ClipConfig
    | HpsConfig
    | PickScoreConfig
    | ImageRewardConfig
    | AestheticConfig
    | Hpsv3Config
    | GenEval2Config
    | GenEvalConfig
    | OcrConfig
    | CallableConfig
    | FunctionConfig
    | RemoteConfig,
    Field(discriminator="kind"),
]


class CompositePart(Config):
    """A reward in a composite: weight x (score - mean) / std."""

    reward: SingleReward = Field(description="The reward of this part.")
    weight: Positive = Field(default=1.0, description="Weight in the mean.")
    mean: Finite = Field(default=0.0, description="Mean to subtract from the score; measure it on teacher images.")
    std: Positive = Field(
        default=1.0, description="Standard deviation to divide the score by; measure it on teacher images."
    )


class CompositeConfig(LabeledByKind):
    """Weighted mean of several standardized rewards; every part is also logged in its own units."""

    kind: Literal["composite"] = "composite"
    parts: tuple[CompositePart, ...] = Field(min_length=1, description="The rewards, their weights and their scales.")

    def _mistakes(self) -> Iterator[str]:
        labels = [part.reward.label for part in self.parts]
        if len(set(labels)) < len(labels):
            yield f"each reward may be a part once, got {labels}"


RealRewardConfig = (
    ClipConfig
    | HpsConfig
    | PickScoreConfig
    | ImageRewardConfig
    | AestheticConfig
    | Hpsv3Config
    | GenEval2Config
    | GenEvalConfig
    | OcrConfig
    | CallableConfig
    | FunctionConfig
    | RemoteConfig
    | CompositeConfig
)
"""Every reward of real images."""

TaggedReward = Annotated[RealRewardConfig, Field(discriminator="kind")]
"""RealRewardConfig as a union discriminated by ``kind``, which gives one error for a wrong kind."""


class ShapesReward(LabeledByKind):
    """A reward of the Shapes world."""

    kind: Literal["shapes_clip", "shapes_pref", "shapes_clip_heldout", "shapes_partial_credit"]
    asset: str | None = Field(default=None, description="safetensors file of another scorer; default: the shipped one.")


RewardConfig = Annotated[ShapesReward | RealRewardConfig, Field(discriminator="kind")]
"""Every reward that can train a student."""
