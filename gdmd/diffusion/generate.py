"""Deterministic image generation: the noise of an image is keyed by (evaluation seed, image number).

So image i is the same whatever the batch size (up to the rounding of the network), and two samplers with the same seed
start image i from the same noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import few_step_sample, ode_sample
from gdmd.types import Codec, Denoiser, Roles, StudentSampler, TextEncoder

BATCH = 100
"""Images per call, for every sampler: speeds are only comparable at one batch size."""
WARM_UP = 8
"""Images of the untimed first call."""


class Components(Protocol):
    """What is needed to generate images; ``recipes.build.Components`` has it."""

    @property
    def roles(self) -> Roles: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def encoder(self) -> TextEncoder: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def teacher_times(self) -> Callable[[int], Tensor]:
        """Number of ODE steps -> their times from noise to data, through the model's own shift."""
        ...


@dataclass(frozen=True)
class Sampler:
    """A way to generate latents: latents(captions, draws of these images) -> x0 [B, C, H, W].

    nfe: forward passes per image; a guided step counts two.
    """

    name: str
    nfe: int
    latents: Callable[[Sequence[str], SampleRng], Tensor]


@dataclass(frozen=True)
class Generation:
    """Images of a list of captions, and how fast they were generated."""

    latents: Tensor  # [N, C, H, W], on the CPU, like the images
    images: Tensor  # [N, 3, S, S] in [0, 1]
    images_per_s: float  # the sampler alone, its noise included
    images_per_s_decoded: float  # sampler and decoder


def student_sampler(
    components: Components,
    denoiser: Denoiser,
    steps: Sequence[float],
    name: str = "student",
    sampler: StudentSampler = "renoise",
) -> Sampler:
    """Few steps at the times ``steps`` (from 1 down): len(steps) NFE."""

    def latents(texts: Sequence[str], rng: SampleRng) -> Tensor:
        noise = rng.normal("eval_noise", components.latent_shape)
        again = lambda i: rng.normal("eval_rollout", components.latent_shape, i)  # noqa: E731
        return few_step_sample(
            denoiser, noise, steps, components.encoder.encode(texts), again, components.roles.schedule, sampler
        )

    return Sampler(name, len(steps), latents)


def teacher_sampler(components: Components, ode_steps: int, guidance: float, name: str = "teacher") -> Sampler:
    """The teacher's deterministic ODE with classifier-free guidance: 2 NFE per step, 1 at guidance 1."""

    def latents(texts: Sequence[str], rng: SampleRng) -> Tensor:
        noise = rng.normal("eval_noise", components.latent_shape)
        guided = Guided(components.roles.teacher, guidance, components.encoder.null(len(texts)), components.roles.guide)
        path = components.teacher_times(ode_steps).to(noise.device)
        return ode_sample(guided, noise, path, components.encoder.encode(texts), components.roles.schedule)

    return Sampler(name, ode_steps * (1 if guidance == 1.0 else 2), latents)


@torch.no_grad()
def images_of(sampler: Sampler, components: Components, texts: Sequence[str], seed: int, batch: int = BATCH) -> Tensor:
    """Image i of [N, 3, S, S] shows texts[i], from noise (seed, i); no timing."""
    parts = [sampler.latents(own, rng) for own, rng in _batches(texts, seed, batch, _device(components))]
    return torch.cat([_decode(components, part).cpu() for part in parts])  # one batch at a time on the device


@torch.no_grad()
def generate(
    sampler: Sampler, components: Components, texts: Sequence[str], seed: int, batch: int = BATCH
) -> Generation:
    """The images of ``images_of``, with the median speed of the full batches; a first call is not timed."""
    device = _device(components)
    for own, rng in _batches(texts[:WARM_UP], seed, WARM_UP, device):
        _decode(components, sampler.latents(own, rng))
    latents, decoded, speeds = [], [], []
    for own, rng in _batches(texts, seed, batch, device):
        start = _now(device)
        part = sampler.latents(own, rng)
        middle = _now(device)
        shown = _decode(components, part)
        speeds.append((len(own), middle - start, _now(device) - start))
        latents.append(part.cpu())  # one batch at a time on the device
        decoded.append(shown.cpu())
    full = [entry for entry in speeds if entry[0] == speeds[0][0]]
    alone, both = (torch.tensor([entry[k] / entry[0] for entry in full]).median().item() for k in (1, 2))
    return Generation(torch.cat(latents), torch.cat(decoded), 1 / alone, 1 / both)


def _batches(
    texts: Sequence[str], seed: int, batch: int, device: torch.device
) -> Iterator[tuple[Sequence[str], SampleRng]]:
    if not len(texts):
        raise ValueError("there are no captions to generate images of; give at least one")
    for start in range(0, len(texts), batch):
        own = texts[start : start + batch]
        yield own, SampleRng(seed, 0, torch.arange(start, start + len(own), device=device))


def _decode(components: Components, latents: Tensor) -> Tensor:
    """Decoded images, clipped to [0, 1] as when they are saved."""
    return components.codec.decode(latents).float().clamp(0, 1)


def _device(components: Components) -> torch.device:
    return next(iter(components.roles.parameters("student").values())).device


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
