"""Detect distilled base models, and reject guidance on them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdmd.models.families.base import Family
from gdmd.models.schedulers import FEW_STEPS

_FEW_STEPS = {"schnell", "lcm"}
"""Words that name few-step models anywhere in a name. Most such models differ from their base in weights only."""
_ENDINGS = {"turbo", "lightning"}
"""Words that do so after the name of a base model or at the end; elsewhere ("lightning-style") they name a subject."""
_BASES = {"sd", "sdxl", "xl", "sd3", "sd15", "sd21", "image", "zimage", "qwen", "sana", "flux", "medium", "large", "5"}
_SUFFIXES = r"v?\d+[a-z]*|steps?|fp16|bf16|fp32|diffusers|unet|lora|merged|fused|model|hf|copy|alpha|beta|preview"
"""What may follow them: versions, numbers of steps, formats."""


def why_distilled(pipe: Any, path: str) -> str | None:
    """Why a pipeline counts as few-step or guidance-distilled; None if nothing indicates it."""
    net = pipe.components.get("unet") or pipe.components.get("transformer")
    config = getattr(net, "config", {})
    scheduler, words = pipe.components["scheduler"], _words(path)
    if pipe.config.get("is_distilled"):
        return "model_index.json says is_distilled"
    if pipe.config.get("sample_sigmas"):
        return "model_index.json has sample_sigmas, the times of a few-step model"
    if config.get("time_cond_proj_dim") is not None:
        return "its UNet reads the guidance as an input (time_cond_proj_dim), as an LCM's does"
    if type(net).__name__ == "FluxTransformer2DModel" and not config.get("guidance_embeds"):
        return "its transformer has no guidance embedding (guidance_embeds), as FLUX.1-schnell's"
    if type(scheduler).__name__ in FEW_STEPS:
        return f"its scheduler is a {type(scheduler).__name__}, which samples few-step models"
    if scheduler.config.get("stochastic_sampling"):
        return "its scheduler has stochastic_sampling, as few-step models have"
    if named := _named(words):
        return f"its name says {named}"
    if "klein" in words and "base" not in words and not Path(path).is_dir():
        return "a klein without -base- in its id is distilled"
    return None


def _named(words: Sequence[str]) -> str | None:
    """The word of a name that marks a few-step model."""
    for i, word in enumerate(words):
        before, rest = words[i - 1] if i else "", words[i + 1 :]
        at_end = all(re.fullmatch(_SUFFIXES, other) for other in rest)
        if word in _FEW_STEPS or (word in _ENDINGS and (at_end or before in _BASES)):
            return word
    return None


def _words(path: str) -> list[str]:
    """Words of the last part of a hub id or folder; for a snapshot in the hub's cache, of its id."""
    folder = Path(path)
    name = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name
    return re.findall(r"[a-z0-9]+", name.lower())


def check_guidance(family: Family, guidance: float) -> None:
    """ValueError for classifier-free guidance on a distilled base; without guidance, a warning.

    A guidance-distilled network predicts what its teacher predicted with guidance; guiding it applies guidance twice.
    """
    cfg = family.cfg
    why = why_distilled(family.pipe, cfg.location) if cfg.distilled is None else "model.distilled = true"
    if why is None or cfg.distilled is False:
        if guidance != 1 and cfg.distilled is None:
            _warn_if_maybe_distilled(family, guidance)
        return
    embedded = (
        f" Its guidance is an input: model.embedded_guidance = {cfg.embedded_guidance:g}."
        if family.guidance_is_embedded
        else " model.embedded_guidance does nothing for it."
    )
    if guidance != 1:
        raise ValueError(
            f"method.guidance = {guidance:g}, but model.path {cfg.path!r} is a distilled model ({why}): guidance is built "
            f"into its weights, and must not be applied again.{embedded} Set method.guidance=1, or give the model "
            "it was distilled from. If it is not distilled, set model.distilled=false"
        )
    logging.getLogger(__name__).warning(
        "model.path %r is a distilled model (%s): the teacher is used as it is, without guidance.%s",
        cfg.path,
        why,
        embedded,
    )


def _warn_if_maybe_distilled(family: Family, guidance: float) -> None:
    """Warn about guidance on a base that may be distilled although nothing proves it."""
    cfg, log = family.cfg, logging.getLogger(__name__)
    if found := _ENDINGS & set(_words(cfg.path)):
        log.warning(
            "the name of model.path %r contains %r, but nothing else indicates a few-step model: it is guided as an "
            "undistilled base. If it is a few-step model, set method.guidance=1; model.distilled=false silences this note",
            cfg.path,
            min(found),
        )
    if family.guidance_is_embedded:
        log.warning(
            "method.guidance = %g is applied on top of model.embedded_guidance = %g, which the network of model.path %r "
            "reads as an input; the published models use method.guidance=1. model.distilled=false silences this warning",
            guidance,
            cfg.embedded_guidance,
            cfg.path,
        )
