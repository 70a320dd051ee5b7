"""How far the student has moved: its samples against the teacher's, from the same prompts, noise and sampler.

    student/moved    their distance, relative to the spread of the teacher's: 0 = the teacher, sqrt(2) = unrelated samples

Weights say less: how far they must move depends on the model, and on adapters or full weights.
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
from gdmd.runs import reward_signal
from gdmd.training.optimizer import lr_factor
from gdmd.types import Denoiser, StudentSampler

MOVED = "student/moved"
"""Key of metrics.jsonl."""
SAMPLES = 8
"""Samples that are compared; fewer if a rank's batch is smaller."""
STUCK, HEALTHY = 0.5, 0.8
"""Displacements at the end of a run. Measured after 60 updates of shapes_dmd with two seeds: at the right rate 1.2 and
1.4 (full weights, 3e-4), 1.1 and 1.3 (LoRA of rank 32, 3e-3); at a rate 10 times too low 0.36 to 0.71, 100 times 0.04
to 0.11, 1000 times 0.01. Longer runs move further: after 120 of the 150 updates of shapes_demo 0.95 at a rate 10 times
too low, 0.27 at 100 times.
"""
SHARE = 0.1
"""Share of a run's steps after which the student is judged."""
UPDATES = 20
"""Student updates before which it is not judged; nor is it before the end of the warm-up."""


def displacement(student: Tensor, teacher: Tensor) -> Tensor:
    """Root mean square of student - teacher, relative to the spread of the teacher's samples around their channel means.

    [B, C, H, W] twice -> 0-d.
    """
    spread = mean_square(teacher - teacher.mean((0, 2, 3), keepdim=True)).mean()
    return (mean_square(student - teacher).mean() / spread.clamp_min(1e-12)).sqrt()


def displacement_hook(
    components: Components,
    prompts: Sequence[str],
    steps: Sequence[float],
    loop: LoopConfig,
    ranks: int,
    sampler: StudentSampler = "renoise",
) -> Callable[[], Mapping[str, float]]:
    """A hook that measures the displacement of the student as it is now (not its EMA), with its ``steps`` and sampler.

    All ranks draw the same samples, so that it works with sharding; the noise is the same at every call. Only for
    a student that starts as the teacher: the distance from it does not say how far another one has moved.
    """
    count = min(SAMPLES, loop.batch_size // ranks)
    texts = [prompts[k * len(prompts) // count] for k in range(count)]

    def sample(denoiser: Denoiser) -> Tensor:
        device = next(iter(components.roles.parameters("student").values())).device
        rng = SampleRng(loop.seed, 0, torch.arange(count, device=device))
        return student_sampler(components, denoiser, steps, sampler=sampler).latents(texts, rng)

    teacher = cache(lambda: sample(components.roles.teacher))
    return lambda: {MOVED: float(displacement(sample(components.roles.student), teacher()))}


def hardly_moves(step: int, values: Mapping[str, float], loop: LoopConfig) -> str:
    """A warning if the student will end its run closer to the teacher than STUCK; else "".

    The distance is extrapolated as the sum of the learning rates: exact for a student that hardly moves, and too far for
    one that does.
    """
    updates, moved = values["updates/student"], values.get(MOVED)
    if moved is None or updates < max(UPDATES, loop.warmup) or step < SHARE * loop.steps:
        return ""
    end = moved / _share_of_rates(step, updates, loop)
    if not end < STUCK:
        return ""
    rewards = " Check the rewards, too." if reward_signal.names(values) else ""
    return (
        f"warning: the student hardly moves: after {updates:.0f} updates its samples differ from the teacher's by "
        f"{moved:.2g} of their spread, on the way to {end:.2g} at the end; healthy runs end above {HEALTHY}. Raise "
        f"loop.lr_student = {loop.lr_student:g}: LoRA needs about 10 times the rate of full weights.{rewards}"
    )


def _share_of_rates(step: int, updates: float, loop: LoopConfig) -> float:
    """Sum of the learning rates up to ``step``, which has this number of student updates, over that of the whole run."""
    points = 1000
    whole = [k / points for k in range(points)]
    rates = [lr_factor(loop.lr_schedule, at, int(at * updates * loop.steps / step), loop.warmup) for at in whole]
    return sum(rates[: max(1, round(points * step / loop.steps))]) / sum(rates)
