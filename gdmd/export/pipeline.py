"""The student's sampler as a stock diffusers scheduler, and the arguments of the stock pipeline call.

A student that re-noises: LCMScheduler for VP models, FlowMatchEulerDiscreteScheduler with stochastic_sampling for flow
models. A deterministic student: DPM-Solver++ of order 1 (DDIM) for VP models, FlowMatchEulerDiscreteScheduler without
stochastic_sampling for flow models.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd.export.lora import merge
from gdmd.io import follow_umask
from gdmd.models.families.base import Family, stored_dtype
from gdmd.models.families.unet import UnetFamily
from gdmd.models.loading import local_or_hub_index
from gdmd.models.pipeline_files import EXTRAS, absent, components
from gdmd.types import StudentSampler

NO_GUIDANCE: Mapping[str, Mapping[str, float | bool]] = {
    "sd15": {"guidance_scale": 0.0},
    "sdxl": {"guidance_scale": 0.0},
    "sd3": {"guidance_scale": 0.0},
    "flux": {},
    "flux2": {},
    "flux2_klein": {"guidance_scale": 1.0},
    "z_image": {"guidance_scale": 0.0},
    "qwen_image": {"true_cfg_scale": 1.0},
    "qwen_image21": {"true_cfg_scale": 1.0},
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "krea2": {"guidance_scale": 0.0},
}
"""Arguments that switch off classifier-free guidance; FLUX.1 and FLUX.2-dev have embedded guidance only.

Sana's pipeline would also replace sizes that are not in its table."""


def student_scheduler(family: Family, uniform: Sequence[float], sampler: StudentSampler = "renoise") -> Any:
    """A scheduler with which the stock pipeline samples as in training, with the pipeline's betas or shift."""
    import diffusers

    return getattr(diffusers, family.student_scheduler(sampler))(**family.student_settings(len(uniform), sampler))


def call_arguments(family: Family, uniform: Sequence[float]) -> dict[str, Any]:
    """Keyword arguments of ``pipe(prompt=..., ...)`` for the student: its steps, size and caption length, no guidance."""
    arguments: dict[str, Any] = {"num_inference_steps": len(uniform)}
    if isinstance(family, UnetFamily):
        arguments["timesteps"] = (
            family.timesteps.network_step(torch.tensor(family.student_times(uniform))).round().int().tolist()
        )
    else:
        arguments["sigmas"] = list(uniform)
    if family.cfg.max_tokens and "max_sequence_length" in inspect.signature(type(family.pipe).__call__).parameters:
        arguments["max_sequence_length"] = family.cfg.max_tokens
    arguments |= NO_GUIDANCE[family.name]
    if family.guidance_is_embedded:
        arguments["guidance_scale"] = family.cfg.embedded_guidance
    return arguments | {"height": family.cfg.height, "width": family.cfg.width}


def left_out(family: Family) -> list[str]:
    """Components that the stock pipeline must be loaded without.

    These are the ones the student was trained without (model.t5 = false, or a base without T5), and the ones that the
    base's index names but its folder lacks.
    """
    index = local_or_hub_index(family.cfg)
    trained = [name for name in family.optional if family.pipe.components.get(name) is None]
    named = [name for name in EXTRAS if name in components(index)]
    return trained + absent(index, named, Path(family.cfg.location))


def _cast(family: Family, dtype: torch.dtype) -> None:
    """Cast all floating-point weights of a pipeline, except those that diffusers keeps in fp32.

    The pipeline's own ``to`` warns about such weights even if there are none.
    """
    for net in (part for part in family.pipe.components.values() if isinstance(part, torch.nn.Module)):
        for name, weights in (*net.named_parameters(), *net.named_buffers()):
            if weights.is_floating_point():
                weights.data = weights.data.to(stored_dtype(net, name, dtype) if net is family.net else dtype)


def save_merged(
    family: Family,
    weights: Mapping[str, Tensor],
    uniform: Sequence[float],
    folder: Path,
    dtype: torch.dtype | None = None,
    sampler: StudentSampler = "renoise",
) -> float:
    """Write the whole pipeline with the student and its scheduler, loadable with ``from_pretrained``.

    ``family`` must be opened without adapters; its network is overwritten by the student. ``dtype``: of all weights
    except those that diffusers keeps in fp32; default: as loaded. Returns the share of changed weights whose change is lost
    by rounding.
    """
    undone = merge(family, weights, dtype)
    if dtype is not None:
        _cast(family, dtype)
    family.pipe.scheduler = student_scheduler(family, uniform, sampler)
    if family.name == "flux2_klein":  # as in the published distilled model: its pipeline makes no unconditional pass
        family.pipe.register_to_config(is_distilled=True)
    family.pipe.save_pretrained(folder)
    follow_umask(*folder.rglob("*.safetensors"))
    return undone
