"""Things that make images, as one word of the command line: [NAME=]WHERE[,key=value ...]."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from gdmd.config.base import Config, Count, NonNegative, NonNegativeCount, Positive, Probability
from gdmd.config.model import Pixels

SchedulerName = Literal["lcm", "tcd", "ddim", "euler", "euler_ancestral", "flow_euler", "flow_dpm"]


class SourceConfig(Config):
    """One source of images. All but name, where, batch, trained and a run's checkpoint is of diffusers pipelines alone."""

    name: str = Field(description="What it is called in tables, and its folder in a comparison.")
    where: str = Field(
        description="A run, an exported folder, a pipeline (folder or hub id), images, or a teacher row."
    )
    steps: Count | None = Field(default=None, description="Steps of a pipeline; default: its own.")
    guidance: NonNegative | None = Field(default=None, description="Guidance scale of a pipeline; default: its own.")
    guidance_rescale: Probability | None = Field(
        default=None, description="Rescaled guidance of Stable Diffusion 1, 2 and XL; default: the pipeline's, none."
    )
    lora: str | None = Field(
        default=None, description="LoRA on top: a .safetensors file, a folder, ORG/NAME or ORG/NAME/FILE.safetensors."
    )
    lora_scale: Positive = Field(default=1.0, description="The LoRA's weight.")
    scheduler: SchedulerName | None = Field(default=None, description="Another scheduler, from the pipeline's betas.")
    spacing: Literal["trailing", "leading", "linspace"] | None = Field(
        default=None, description="Where its timesteps lie; SDXL-Lightning and Turbo need trailing."
    )
    shift: Positive | None = Field(default=None, description="Static shift of a flow model's scheduler.")
    timesteps: tuple[NonNegativeCount, ...] = Field(
        default=(), description="Training steps at which the network is called, joined by +; sets steps."
    )
    eta: NonNegative | None = Field(default=None, description="Noise that tcd or ddim adds at every step; default: 0.")
    height: Pixels | None = Field(default=None, description="Pixels; default: the pipeline's.")
    width: Pixels | None = Field(default=None, description="Pixels; default: the pipeline's.")
    base: str | None = Field(default=None, description="The pipeline below an exported LoRA, where it has moved.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    variant: str | None = Field(default=None, description='Variant of the weight files, for example "fp16".')
    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="bf16", description="Precision of a pipeline.")
    device: str | None = Field(default=None, description="Where it runs; default: the GPU where there is one.")
    checkpoint: str = Field(default="last", description="Which checkpoint of a run: best, last or a step.")
    batch: Count | None = Field(default=None, description="Images per call; default: 100 Shapes images, else 4.")
    trained: tuple[str, ...] = Field(
        default=(), description="Rewards a foreign model was trained on, joined by +; runs and exports know theirs."
    )

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip(".-") or "source"

    def changed(self, given: Mapping[str, Any]) -> SourceConfig:
        """The same with other settings, validated again."""
        return checked(SourceConfig, self.model_dump(exclude_unset=True) | dict(given), f"source {self.where!r}")


_NUMBERS = {"steps", "height", "width", "batch"}
_SEVERAL = {"trained", "timesteps"}


def read_source(text: str) -> SourceConfig:
    """``[NAME=]WHERE[,key=value ...]`` -> its config. ValueError that names the key and what is possible."""
    first, *rest = text.split(",")
    name, equals, where = first.partition("=")
    if not equals:
        name, where = re.split(r"[\\/]", first.rstrip("/\\"))[-1], first
    if not where.strip() or not name.strip():
        raise ValueError(f"source {text!r} names no place; write [NAME=]WHERE[,key=value ...]")
    return checked(SourceConfig, {"name": name, "where": where, **_pairs(text, rest)}, f"source {text!r}")


def _pairs(text: str, parts: Sequence[str]) -> dict[str, Any]:
    known = [key for key in SourceConfig.model_fields if key not in ("name", "where")]
    given: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"source {text!r}: {part!r} is no key=value of a source; {advice}")
        if key in given:
            raise ValueError(f"source {text!r}: {key} is given twice; give it once")
        number = key in _NUMBERS and re.fullmatch(r"\d{1,18}", value)
        given[key] = int(value) if number else _several(value, key) if key in _SEVERAL else value
    return given


def _several(value: str, key: str) -> tuple[str | int, ...]:
    """What + joins; numbers as numbers where numbers are wanted."""
    parts = value.split("+")
    if key == "timesteps" and all(re.fullmatch(r"\d{1,6}", part) for part in parts):
        return tuple(int(part) for part in parts)
    return tuple(parts)


def read_sources(texts: Sequence[str]) -> tuple[SourceConfig, ...]:
    """Several sources, whose names must differ (as folders, too)."""
    sources = tuple(read_source(text) for text in texts)
    slugs = [source.slug.lower() for source in sources]
    twice = [source.name for source in sources if slugs.count(source.slug.lower()) > 1]
    if twice:
        raise ValueError(f"two sources are called {twice[0]!r}; give each a name of its own: NAME={sources[0].where}")
    return sources


def checked(cls: type[SourceConfig], given: dict[str, Any], what: str) -> SourceConfig:
    """The validated config. ValueError with every mistake in one line each."""
    try:
        return cls.model_validate(given)
    except ValidationError as error:
        lines = [f"{what}: {'.'.join(map(str, one['loc']))} = {one['input']!r}: {one['msg']}" for one in error.errors()]
        raise ValueError("\n".join(lines)) from None
