"""How far the student has moved: its samples against the teacher's, from the same prompts, noise and sampler.

Weights would not do as a measure: the distance that matters depends on the model, and on adapters or full weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from gdmd.config.training import LoopConfig
from gdmd.diffusion.generate import Components, student_sampler
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.denoising import mean_square
from gdmd.runs.student_moves import MOVED
from gdmd.types import Denoiser

SAMPLES = 8
"""Samples that are compared; fewer if a rank's batch is smaller."""


def displacement(student: Tensor, teacher: Tensor) -> Tensor:
    """Root mean square of student - teacher, relative to the spread of the teacher's samples around their channel means.

    [B, C, H, W] twice -> 0-d. 0: the same samples; sqrt(2): independent ones of the same spread.
    """
    spread = mean_square(teacher - teacher.mean((0, 2, 3), keepdim=True)).mean()
    return (mean_square(student - teacher).mean() / spread.clamp_min(1e-12)).sqrt()


def displacement_hook(
    components: Components, prompts: Sequence[str], steps: Sequence[float], loop: LoopConfig, ranks: int
) -> Callable[[], Mapping[str, float]]:
    """A hook that measures the displacement of the student as it is now (not its EMA) at ``steps``.

    All ranks draw the same samples, so that it works with sharding. The draws are fixed and belong to nothing else.
    Nothing is measured with loop.start_from: that student does not start as the teacher.
    """
    if loop.start_from:
        return dict
    count = min(SAMPLES, loop.batch_size // ranks)
    texts = [prompts[k * len(prompts) // count] for k in range(count)]

    def sample(denoiser: Denoiser) -> Tensor:
        device = next(iter(components.roles.parameters("student").values())).device
        rng = SampleRng(loop.seed, 0, torch.arange(count, device=device))
        return student_sampler(components, denoiser, steps).latents(texts, rng)

    teacher = cache(lambda: sample(components.roles.teacher))
    return lambda: {MOVED: float(displacement(sample(components.roles.student), teacher()))}
