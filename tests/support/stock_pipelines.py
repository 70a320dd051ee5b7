"""Images of a student by the trainer's sampler, and by the stock diffusers pipeline from the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from torch import Tensor

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.run import RunConfig
from gdmd.diffusion.sampling import few_step_sample
from gdmd.export.pipeline import call_arguments
from gdmd.models.families.base import Family
from gdmd.models.loading import open_family
from gdmd.models.packing import in_patches, pack
from gdmd.models.roles import DiffusersRoles
from gdmd.models.vae import on_white
from gdmd.types import StudentSampler

UNIFORM = (1.0, 0.75, 0.5, 0.25)
CAPTIONS = list(tiny.WORDS[:2])


@cache
def shared(folder: Path) -> Family:
    """A family for tests that do not change it."""
    return open_family(tiny.config(folder))


def states(roles: DiffusersRoles, count: int = 2) -> tuple[Tensor, Tensor, Any]:
    """x_t, t and the conditioning of some captions, the same in every call."""
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(count, *roles.family.latent_shape, generator=generator)
    return x_t, torch.linspace(0.9, 0.3, count), roles.family.encoder.encode(tiny.WORDS[:count])


def student_of(folders: Path, name: str, full: str = "none") -> DiffusersRoles:
    """A student that differs from its teacher."""
    roles = DiffusersRoles(open_family(tiny.config(tiny.saved(folders, name), full=full)))
    with torch.no_grad():
        for weights in roles.parameters("student").values():
            weights.add_((0.2 if full == "none" else 0.02) * torch.randn_like(weights))
    return roles


def dmd_recipe(folder: Path, prompts: Path, guidance: float = 3.0, **model: Any) -> RunConfig:
    method = DMDConfig(fake_updates=1, guidance=guidance, step_draw="batch")
    return RunConfig(
        name="x", model=tiny.config(folder, **model), method=method, prompts={"file": str(prompts)}, loop={}
    )


def noises_of(roles: DiffusersRoles) -> list[Tensor]:
    return [torch.randn(2, *roles.family.latent_shape) for _ in UNIFORM]


def trainers_images(
    roles: DiffusersRoles,
    noises: list[Tensor],
    captions: Sequence[str] = CAPTIONS,
    sampler: StudentSampler = "renoise",
    uniform: Sequence[float] = UNIFORM,
) -> Tensor:
    family = roles.start
    steps, cond = family.student_times(uniform), family.encoder.encode(captions)
    x0 = few_step_sample(roles.student, noises[0], steps, cond, lambda i: noises[i], roles.schedule, sampler)
    return family.codec.decode(x0).clamp(0, 1)


def stock_images(
    pipe: Any,
    roles: DiffusersRoles,
    noises: list[Tensor],
    patch: pytest.MonkeyPatch,
    captions: Sequence[str] = CAPTIONS,
    *,
    bound: bool = False,
    uniform: Sequence[float] = UNIFORM,
) -> Tensor:
    """The stock call with our noise for its re-noising steps; ``bound``: the pipeline's call has the arguments."""
    name = roles.family.name
    if name == "qwen_image21" and len(captions) > 1:  # its images depend on the padding of a batch
        parts = ([noise[k : k + 1] for noise in noises] for k in range(len(captions)))
        alone = zip(parts, captions, strict=True)
        given: dict[str, Any] = {"bound": bound, "uniform": uniform}
        return torch.cat([stock_images(pipe, roles, part, patch, [text], **given) for part, text in alone])
    packed = name in ("flux", "flux2", "flux2_klein", "qwen_image", "krea2")
    shown = [pack(noise) if packed else noise for noise in noises]
    if name == "qwen_image21":
        shown = [noise.flatten(2).mT for noise in noises]
    drawn: Iterator[Tensor] = iter([*shown[1:], shown[0]])  # some draw once more at the end, for noise 0
    for module in ("scheduling_lcm", "scheduling_flow_match_euler_discrete"):
        patch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: next(drawn))
    pipe.set_progress_bar_config(disable=True)
    arguments = {} if bound else call_arguments(roles.start, uniform)
    if name in ("sd3", "flux", "z_image") and not bound:
        arguments.setdefault("max_sequence_length", 256)
    start = in_patches(noises[0]) if name.startswith("flux2") else shown[0]
    return on_white(pipe(prompt=list(captions), latents=start, output_type="pt", **arguments).images)
