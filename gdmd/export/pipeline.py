"""The trained sampler as a stock diffusers scheduler and the arguments of the stock call.

Student sampling is predict x0, then re-noise: LCMScheduler for VP models, FlowMatchEulerDiscreteScheduler with
stochastic_sampling for flow models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.export.lora import merge
from gdmd.io import follow_umask
from gdmd.models.families.base import Family
from gdmd.models.families.unet import UnetFamily
from gdmd.models.loading import local_or_hub_index
from gdmd.models.pipeline_files import EXTRAS, absent, components

NO_GUIDANCE: Mapping[str, Mapping[str, float | bool]] = {
    "sd15": {"guidance_scale": 0.0},
    "sdxl": {"guidance_scale": 0.0},
    "sd3": {"guidance_scale": 0.0},
    "flux": {},
    "flux2": {},
    "flux2_klein": {"guidance_scale": 1.0},
    "z_image": {"guidance_scale": 0.0},
    "qwen_image": {"true_cfg_scale": 1.0},
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False},
}
"""What switches classifier-free guidance off in the stock call; FLUX.1 and FLUX.2-dev have an embedded one only.

Sana's pipeline would also replace sizes that are not in its table."""


def student_scheduler(family: Family, uniform: Sequence[float]) -> Any:
    """A scheduler with which the stock pipeline re-noises as in training; the betas or shift are the pipeline's own."""
    import diffusers

    return getattr(diffusers, family.student_scheduler)(**family.student_settings(len(uniform)))


def call_arguments(family: Family, uniform: Sequence[float]) -> dict[str, Any]:
    """Keyword arguments of ``pipe(prompt=..., ...)`` for the student: its steps, size and caption length, no guidance."""
    arguments: dict[str, Any] = {"num_inference_steps": len(uniform)}
    if isinstance(family, UnetFamily):
        arguments["timesteps"] = (
            family.timesteps.network_step(torch.tensor(family.student_times(uniform))).round().int().tolist()
        )
    else:
        arguments["sigmas"] = list(uniform)
    if family.cfg.max_tokens and not family.fixed_captions:
        arguments["max_sequence_length"] = family.cfg.max_tokens
    arguments |= NO_GUIDANCE[family.name]
    if family.guidance_is_embedded:
        arguments["guidance_scale"] = family.cfg.embedded_guidance
    return arguments | {"height": family.cfg.height, "width": family.cfg.width}


def left_out(family: Family) -> list[str]:
    """Components that the stock pipeline must be loaded without.

    Those the student was trained without (model.t5 = false, or a base without T5), and those that the base names but
    does not hold.
    """
    index = local_or_hub_index(family.cfg)
    trained = [name for name in family.optional if family.pipe.components.get(name) is None]
    named = [name for name in EXTRAS if name in components(index)]
    return trained + absent(index, named, Path(family.cfg.path))


def _cast(pipe: Any, dtype: torch.dtype) -> None:
    """All floating-point weights of a pipeline. Its own ``to`` warns of modules kept in fp32 even where there are none."""
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for weights in (one for net in networks for one in (*net.parameters(), *net.buffers())):
        if weights.is_floating_point():
            weights.data = weights.data.to(dtype)


def save_merged(
    family: Family,
    weights: Mapping[str, Tensor],
    uniform: Sequence[float],
    folder: Path,
    dtype: torch.dtype | None = None,
) -> float:
    """Write the whole pipeline with the student in it and its scheduler, loadable with ``from_pretrained``.

    ``family`` is used up: its network becomes the student. It must be opened without adapters on it. ``dtype``: of all
    weights; default: as they were loaded. Returns the share of the changed weights that rounding has undone.
    """
    undone = merge(family, weights, dtype)
    if dtype is not None:
        _cast(family.pipe, dtype)
    family.pipe.scheduler = student_scheduler(family, uniform)
    family.pipe.save_pretrained(folder)
    follow_umask(*folder.rglob("*.safetensors"))
    return undone
