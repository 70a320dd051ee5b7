"""Samplers: the teacher's ODE and the student's few steps. They do not depend on the network.

The student predicts x0 and noise eps at each step and goes to the next step s, x_s = alpha(s) x0 + sigma(s) n, with

    renoise   n = fresh noise         consistency models, DMD2 (arXiv 2405.14867)
    ode       n = eps                 deterministic: Euler's method for flows, DDIM (arXiv 2010.02502) for VP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.schedule import expand, renoise, shift_time, widen
from gdmd.types import Cond, Denoiser, Schedule, StudentSampler

NoiseAt = Callable[[int], Tensor]
"""Fresh noise [B, C, H, W] for the i-th re-noising of a rollout (i >= 1)."""


def times(steps: int, shift: float = 1.0) -> Tensor:
    """steps + 1 times from 1 (noise) to 0 (data), uniform before the shift. [steps + 1]"""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


@torch.no_grad()
def ode_sample(denoiser: Denoiser, noise: Tensor, t: Tensor, cond: Cond, schedule: Schedule) -> Tensor:
    """Deterministic sampling along ``t`` [N + 1] (1 -> 0): x_s = alpha(s) x0 + sigma(s) eps.

    For the flow schedule this is Euler's method, for VP it is DDIM. noise [B, C, H, W] -> x0 [B, C, H, W].
    """
    x_t = widen(noise)
    for now, following in zip(t[:-1], t[1:], strict=True):
        here, there = now.expand(len(x_t)), following.expand(len(x_t))
        prediction = denoiser(x_t, here, cond)
        alpha, sigma = expand(schedule.alpha(there), x_t), expand(schedule.sigma(there), x_t)
        x_t = alpha * prediction.x0 + sigma * prediction.eps
    return x_t


@torch.no_grad()
def few_step_sample(
    student: Denoiser,
    noise: Tensor,
    steps: Sequence[float],
    cond: Cond,
    noise_at: NoiseAt,
    schedule: Schedule,
    sampler: StudentSampler = "renoise",
) -> Tensor:
    """The student's sampler from noise [B, C, H, W] to x0; ``noise_at`` is used by ``renoise`` only."""
    at = [torch.full((len(noise),), t, device=noise.device) for t in steps]
    found = student(noise, at[0], cond)
    for i in range(1, len(steps)):
        n = found.eps if sampler == "ode" else noise_at(i)
        found = student(renoise(found.x0, at[i], n, schedule), at[i], cond)
    return found.x0


@torch.no_grad()
def backward_simulation(
    student: Denoiser,
    noise: Tensor,
    steps: Sequence[float],
    stop: Tensor,
    cond: Cond,
    noise_at: NoiseAt,
    schedule: Schedule,
    last: int | None = None,
    sampler: StudentSampler = "renoise",
) -> Tensor:
    """The same rollout stopped before step ``stop`` [B] (int64, on the CPU): x_tau at tau = steps[stop]. [B, C, H, W]

    Sample i costs stop[i] forwards: finished samples leave the batch. With ``last`` >= max(stop) the student is called
    exactly ``last`` times, on a finished sample when none is left: ranks that share a sharded network deadlock if one of
    them calls it more often than another.
    """
    x_tau = noise.clone()
    left = torch.arange(len(noise), device=stop.device)
    for i in range(1, len(steps) if last is None else last + 1):
        left = left[stop[left] >= i]
        if last is None and not len(left):
            break
        active = to_device_async(left, noise.device)
        called = active if len(left) else to_device_async(torch.zeros_like(stop[:1]), noise.device)
        own = {name: value[called] for name, value in cond.items()}
        before = torch.full((len(called),), steps[i - 1], device=noise.device)
        found = student(x_tau[called], before, own)
        after = torch.full((len(active),), steps[i], device=noise.device)
        n = found.eps[: len(active)] if sampler == "ode" else noise_at(i)[active]
        x_tau[active] = renoise(found.x0[: len(active)], after, n, schedule)
    return x_tau


@torch.no_grad()
def continuation(
    student: Denoiser,
    x0: Tensor,
    stop: Tensor,
    steps: Sequence[float],
    cond: Cond,
    noise_at: NoiseAt,
    schedule: Schedule,
    *,
    together: bool = False,
    sampler: StudentSampler = "renoise",
) -> Tensor:
    """The rest of the sampler for x0 predicted at step ``stop`` [B] (int64, CPU): re-noise, predict, ...

    The last step has no next one: its x0 is re-noised to the last step again. x0 [B, C, H, W] -> [B, C, H, W].
    With ``ode`` only the first of these steps has fresh noise, so that K continuations of one x0 differ.
    Sample i costs max(1, N - 1 - stop[i]) forwards. ``together`` calls the student exactly N - 1 times, on one sample
    when none is due, as ranks that share a sharded network must.
    """
    if len(steps) < 2:
        raise ValueError(
            f"a sampler of {len(steps)} step(s) has no step after the first; continuations need two or more"
        )
    y, n = x0.clone(), torch.zeros_like(x0)
    entry = (stop + 1).clamp_max(len(steps) - 1)
    for i in range(1, len(steps)):
        ready = torch.nonzero(entry <= i)[:, 0]
        if not len(ready) and not together:
            continue
        due = to_device_async(ready, x0.device)
        called = due if len(ready) else to_device_async(torch.zeros_like(stop[:1]), x0.device)
        when = torch.full((len(called),), steps[i], device=x0.device)
        entering = (entry == i) | (sampler == "renoise")
        n = torch.where(expand(to_device_async(entering, x0.device), x0), noise_at(i), n)
        own = {name: value[called] for name, value in cond.items()}
        found = student(renoise(y[called], when, n[called], schedule), when, own)
        y[due], n[due] = found.x0[: len(due)], found.eps[: len(due)]
    return y
