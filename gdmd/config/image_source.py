"""Sources of images as one command-line argument: [NAME=]WHERE[,key=value ...]."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from gdmd.config.base import (
    Config,
    Count,
    DeviceName,
    NonNegative,
    NonNegativeCount,
    Positive,
    Probability,
    expand_home,
)
from gdmd.config.load import validated
from gdmd.config.model import Pixels

SchedulerName = Literal["lcm", "tcd", "ddim", "euler", "euler_ancestral", "flow_euler", "flow_dpm"]


class SourceConfig(Config):
    """One source of images. Fields other than name, where, batch, trained and checkpoint are for diffusers pipelines.

    A run takes also base, device, and the height and width of one of its sizes.
    """

    name: str = Field(description="Name in tables and of the folder of its images.")
    where: str = Field(
        description="A run, an exported folder, a pipeline (folder or hub id), images, or a teacher row."
    )
    steps: Count | None = Field(default=None, description="Sampling steps; default: those of the pipeline.")
    guidance: NonNegative | None = Field(
        default=None,
        description="Guidance scale as the pipeline counts it, for Z-Image and Krea 2 from 0: one less than "
        "method.guidance; default: that of the pipeline.",
    )
    guidance_rescale: Probability | None = Field(
        default=None, description="Guidance rescale of Stable Diffusion 1, 2 and XL; default: off."
    )
    lora: str | None = Field(
        default=None,
        description="LoRA to load: a .safetensors file, a folder (also PEFT's), ORG/NAME or ORG/NAME/FILE.safetensors.",
    )
    lora_scale: Positive = Field(default=1.0, description="Weight of the LoRA.")
    lora_partial: bool = Field(
        default=False, description="Load a LoRA although the pipeline lacks some of its layers, which are skipped."
    )
    scheduler: SchedulerName | None = Field(
        default=None,
        description="Scheduler, with the pipeline's betas; default: that of the pipeline.",
    )
    spacing: Literal["trailing", "leading", "linspace"] | None = Field(
        default=None, description="Timestep spacing of the scheduler; SDXL-Lightning and Turbo need trailing."
    )
    shift: Positive | None = Field(
        default=None,
        description="Static shift of a flow-matching scheduler; default: its own.",
    )
    timesteps: tuple[NonNegativeCount, ...] = Field(
        default=(), description="Timesteps at which the network is called, joined by +; replaces steps."
    )
    eta: NonNegative | None = Field(default=None, description="Stochasticity of tcd or ddim; default: 0.")
    height: Pixels | None = Field(
        default=None,
        description="Image height in pixels; default: that of the pipeline or run. A run has the sizes of its training.",
    )
    width: Pixels | None = Field(default=None, description="Image width in pixels; see height.")
    base: str | None = Field(
        default=None,
        description="New location of the base model of a run or an exported LoRA, if it has moved.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of the hub id.")
    variant: str | None = Field(default=None, description='Variant of the weight files, for example "fp16".')
    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="bf16", description="Precision of a pipeline.")
    device: DeviceName | None = Field(default=None, description="Device; default: the GPU if there is one.")
    checkpoint: str = Field(default="last", description="Checkpoint of a run: best, last or a step.")
    batch: Count | None = Field(default=None, description="Images per call; default: 100 for Shapes, else 4.")
    trained: tuple[str, ...] = Field(
        default=(),
        description="Rewards that a model was trained on elsewhere, joined by +; runs and exports record theirs.",
    )

    def _mistakes(self) -> Iterator[str]:
        unread = sorted({"lora_scale", "lora_partial"} & self.model_fields_set)
        if unread and self.lora is None:
            yield f"{' and '.join(unread)} without lora changes nothing; name the LoRA with lora="

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip(".-") or "source"

    def changed(self, given: Mapping[str, Any]) -> SourceConfig:
        """A copy with other settings, validated again."""
        return _validated(self.model_dump(exclude_unset=True) | dict(given), f"source {self.where!r}")

    def with_options(self, given: Mapping[str, Any]) -> SourceConfig:
        """A copy with options of a command (None = not given). ValueError for values that differ from its own."""
        options = {key: value for key, value in given.items() if value is not None}
        differ = [key for key in options if key in self.model_fields_set and getattr(self, key) != options[key]]
        if differ:
            both = "; ".join(f"{key}={getattr(self, key)}, but --{key} {options[key]}" for key in differ)
            raise ValueError(f"source {self.where!r}: it has {both}; give each once")
        return self.changed(options)


_NUMBERS = {"steps", "height", "width", "batch"}
_JOINED = {"trained", "timesteps"}


def read_source(text: str) -> SourceConfig:
    """Parse ``[NAME=]WHERE[,key=value ...]``. ValueError that names the wrong key and the known ones.

    The longest existing path takes precedence over other readings: ``runs/lr=1e-4`` and ``a,b`` are folders if they
    exist. Quotes around WHERE or a value keep commas and equals signs: ``x="runs/a,b",steps=4``.
    """
    pieces = split_settings(text)
    name, where, used = _named(pieces)
    if not where.strip() or not name.strip():
        raise ValueError(f"source {text!r} has no location; write [NAME=]WHERE[,key=value ...]")
    return _validated({"name": name, "where": where, **_pairs(text, pieces[used:])}, f"source {text!r}")


def named_place(text: str) -> tuple[str, str]:
    """Parse ``[NAME=]WHERE`` without settings; an existing path takes precedence, quotes are removed."""
    if _exists(text):
        return _last(text), text
    name, equals, where = text.partition("=")
    if equals and not re.search(r"[,\\/\"']", name):
        return name, unquoted(where)
    return _last(unquoted(text)), unquoted(text)


def _named(pieces: Sequence[str]) -> tuple[str, str, int]:
    """Name, location, and the number of pieces that they use."""
    for count in range(len(pieces), 0, -1):
        joined = ",".join(pieces[:count])
        name, where = named_place(joined)
        if count == 1 or _exists(where):
            return name, where, count
    raise AssertionError("a text has at least one piece")


def _exists(path: str) -> bool:
    return os.path.exists(expand_home(path))


def _last(where: str) -> str:
    """The last part of a path."""
    return re.split(r"[\\/]", where.rstrip("/\\"))[-1]


def split_settings(text: str) -> list[str]:
    """Split at commas, except at those inside a quoted part or a quoted value."""
    return re.findall(r"""(?:^|,)((?:[^,"'=]*=)?(?:"[^"]*"|'[^']*')(?=,|$)|[^,]*)""", text)


def unquoted(value: str) -> str:
    """The value without surrounding quotes."""
    return value[1:-1] if len(value) > 1 and value[0] in "\"'" and value[-1] == value[0] else value


def _pairs(text: str, parts: Sequence[str]) -> dict[str, Any]:
    known = [key for key in SourceConfig.model_fields if key not in ("name", "where")]
    given: dict[str, Any] = {}
    for part, key, value in settings_of(parts):
        if value is None or key not in known:
            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise ValueError(
                f"source {text!r}: {part!r} is not a key=value of a source; {advice} A name with a comma needs "
                'quotes: x="a,b",lora="c,d.safetensors"'
            )
        if key in given:
            raise ValueError(f"source {text!r}: {key} is given twice; give it once")
        number = key in _NUMBERS and re.fullmatch(r"\d{1,18}", value)
        given[key] = int(value) if number else _joined(value, key) if key in _JOINED else value
    return given


def settings_of(parts: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """(part, key, value) of each ``key=value`` without quotes; value None for a part without an equals sign.

    The following parts belong to a value if together they are an existing path: ``lora=a,b.safetensors``.
    """
    first = 0
    while first < len(parts):
        counts = range(len(parts), first + 1, -1)
        last = next((end for end in counts if _exists(_value(parts[first:end]))), first + 1)
        key, equals, _ = parts[first].partition("=")
        yield ",".join(parts[first:last]), key, unquoted(_value(parts[first:last])) if equals else None
        first = last


def _value(parts: Sequence[str]) -> str:
    return ",".join(parts).partition("=")[2]


def _joined(value: str, key: str) -> tuple[str | int, ...]:
    """The parts joined by +; timesteps as integers."""
    parts = value.split("+")
    if key == "timesteps" and all(re.fullmatch(r"\d{1,6}", part) for part in parts):
        return tuple(int(part) for part in parts)
    return tuple(parts)


def read_sources(texts: Sequence[str]) -> tuple[SourceConfig, ...]:
    """Parse several sources; their names must differ, also as folder names."""
    sources = tuple(read_source(text) for text in texts)
    slugs = [source.slug.lower() for source in sources]
    twice = [source.name for source in sources if slugs.count(source.slug.lower()) > 1]
    if twice:
        raise ValueError(f"two sources are called {twice[0]!r}; give each another name: NAME={sources[0].where}")
    return sources


def _validated(given: dict[str, Any], name: str) -> SourceConfig:
    source: SourceConfig = validated(SourceConfig, given, name)
    return source
