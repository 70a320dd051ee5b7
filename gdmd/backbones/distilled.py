"""Detect distilled base models, and refuse them as teachers with guidance."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gdmd.backbones.base import Family
from gdmd.backbones.schedulers import FEW_STEPS

NAMES = {"turbo", "schnell", "lightning", "lcm"}
"""Words in the names of published few-step models. Most of them differ from their base only in their weights."""


def why_distilled(pipe: Any, path: str) -> str | None:
    """Why a pipeline counts as a few-step or guidance-distilled model; None if nothing says so."""
    net = pipe.components.get("unet") or pipe.components.get("transformer")
    config = getattr(net, "config", {})
    scheduler, words = pipe.components["scheduler"], set(re.split(r"[^a-z0-9]+", _name(path).lower()))
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
    if words & NAMES:
        return f"its name says {min(words & NAMES)}"
    if "klein" in words and "base" not in words and not Path(path).is_dir():
        return "a klein without -base- in its id is distilled"
    return None


def _name(path: str) -> str:
    """The last part of a hub id or a folder; of a snapshot in the hub's cache, the id."""
    place = Path(path)
    return place.parent.parent.name if place.parent.name == "snapshots" else place.name


def check_guidance(family: Family, guidances: Iterable[float]) -> None:
    """ValueError for a distilled base under classifier-free guidance; without guidance, a warning.

    Such a network was trained to predict what its own teacher predicts with guidance. Guiding it again applies guidance
    twice.
    """
    cfg = family.cfg
    why = why_distilled(family.pipe, cfg.path) if cfg.distilled is None else "model.distilled = true"
    if why is None or cfg.distilled is False:
        return
    guided = [guidance for guidance in guidances if guidance != 1]
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
