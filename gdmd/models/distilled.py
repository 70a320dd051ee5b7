"""Detect distilled base models, and refuse them as teachers with guidance."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gdmd.models.families.base import Family
from gdmd.models.schedulers import FEW_STEPS

_FEW_STEPS = {"schnell", "lcm"}
"""Words that name few-step models wherever they are in a name. Most of these differ from their base in weights only."""
_ENDINGS = {"turbo", "lightning"}
"""Words that do so behind the name of a base model or at the end; elsewhere ("lightning-style") they name a subject."""
_BASES = {"sd", "sdxl", "xl", "sd3", "sd15", "sd21", "image", "zimage", "qwen", "sana", "flux", "medium", "large", "5"}
_MORE = r"v?\d+[a-z]*|steps?|fp16|bf16|fp32|diffusers|unet|lora|merged|fused|model|hf|copy|alpha|beta|preview"
"""What may follow: versions, numbers of steps, formats."""


def why_distilled(pipe: Any, path: str) -> str | None:
    """Why a pipeline counts as a few-step or guidance-distilled model; None if nothing says so."""
    net = pipe.components.get("unet") or pipe.components.get("transformer")
    config = getattr(net, "config", {})
    scheduler, words = pipe.components["scheduler"], _words(path)
    if pipe.config.get("is_distilled"):
        return "model_index.json says is_distilled"
    if config.get("time_cond_proj_dim") is not None:
        return "its UNet reads the guidance as an input (time_cond_proj_dim), as an LCM's does"
    if type(net).__name__ == "FluxTransformer2DModel" and not config.get("guidance_embeds"):
        return "its transformer has no guidance embedding (guidance_embeds), as FLUX.1-schnell's"
    if type(scheduler).__name__ in FEW_STEPS:
        return f"its scheduler is a {type(scheduler).__name__}, which samples few-step students"
    if scheduler.config.get("stochastic_sampling"):
        return "its scheduler has stochastic_sampling, as few-step students have"
    if named := _named(words):
        return f"its name says {named}"
    if "klein" in words and "base" not in words and not Path(path).is_dir():
        return "a klein without -base- in its id is distilled"
    return None


def _named(words: Sequence[str]) -> str | None:
    """The word of a name that calls its model a few-step one."""
    for place, word in enumerate(words):
        behind, rest = words[place - 1] if place else "", words[place + 1 :]
        ends = all(re.fullmatch(_MORE, other) for other in rest)
        if word in _FEW_STEPS or (word in _ENDINGS and (ends or behind in _BASES)):
            return word
    return None


def _words(path: str) -> list[str]:
    """Those of the last part of a hub id or a folder; of a snapshot in the hub's cache, of the id."""
    place = Path(path)
    name = place.parent.parent.name if place.parent.name == "snapshots" else place.name
    return re.findall(r"[a-z0-9]+", name.lower())


def check_guidance(family: Family, guidances: Iterable[float]) -> None:
    """ValueError for a distilled base under classifier-free guidance; without guidance, a warning.

    Such a network was trained to predict what its own teacher predicts with guidance. Guiding it again applies guidance
    twice.
    """
    cfg = family.cfg
    why = why_distilled(family.pipe, cfg.path) if cfg.distilled is None else "model.distilled = true"
    guided = [guidance for guidance in guidances if guidance != 1]
    if why is None or cfg.distilled is False:
        if guided and cfg.distilled is None:
            _note_doubts(family, guided[0])
        return
    embedded = (
        f" Its guidance is an input: model.embedded_guidance = {cfg.embedded_guidance:g}."
        if family.guidance_is_embedded
        else " model.embedded_guidance does nothing for it."
    )
    if guided:
        raise ValueError(
            f"method.guidance = {guided[0]:g}, but model.path {cfg.path!r} is a distilled model ({why}): guidance is built "
            f"into its weights, and must not be applied again.{embedded} Set method.guidance=1, or give the model "
            "that it was distilled from. If it is not distilled, set model.distilled=false"
        )
    logging.getLogger(__name__).warning(
        "model.path %r is a distilled model (%s): the teacher is used as it is, without guidance.%s",
        cfg.path,
        why,
        embedded,
    )


def _note_doubts(family: Family, guidance: float) -> None:
    """Say what may be wrong with guiding a base that nothing shows to be distilled."""
    cfg, log = family.cfg, logging.getLogger(__name__)
    if found := _ENDINGS & set(_words(cfg.path)):
        log.warning(
            "the name of model.path %r contains %r, but nothing shows a few-step model: it is guided as an undistilled "
            "base. If it is a few-step model, set method.guidance=1; model.distilled=false turns this note off",
            cfg.path,
            min(found),
        )
    if family.guidance_is_embedded:
        log.warning(
            "method.guidance = %g is applied on top of model.embedded_guidance = %g, which the network of model.path %r "
            "reads as an input; the published models are used with method.guidance=1. model.distilled=false turns this note "
            "off",
            guidance,
            cfg.embedded_guidance,
            cfg.path,
        )
