"""The clocks of diffusers' schedulers: the shifts of flow models, and the discrete steps of VP models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdmd.diffusion.schedule import VpSchedule


@dataclass(frozen=True)
class FlowClock:
    """Shifted flow times: t = s u / (1 + (s - 1) u) (arXiv 2403.03206, eq. 23), s = ``shift``.

    ``terminal`` (Qwen-Image): the teacher's last time, to which its whole path is stretched; None = no stretch.
    """

    shift: float
    terminal: float | None = None

    def times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        """Uniform times, falling from at most 1 -> the student's times; a few steps are not stretched."""
        return tuple(self.shift * u / (1 + (self.shift - 1) * u) for u in uniform)

    def path(self, uniform: Sequence[float]) -> Tensor:
        """The teacher's times, 1 - t scaled so that the last is ``terminal``; then 0. [N + 1], fp32"""
        t = torch.tensor(self.times(uniform), dtype=torch.float64)
        if self.terminal is not None and t[-1] < 1:
            t = 1 - (1 - t) * (1 - self.terminal) / (1 - t[-1])
        return torch.cat([t, t.new_zeros(1)]).float()


def uniform_times(steps: int) -> list[float]:
    """1, (N-1)/N, ..., 1/N."""
    return [(steps - i) / steps for i in range(steps)]


def flow_clock(scheduler: Mapping[str, Any], tokens: int, mu: float | None = None) -> FlowClock:
    """The clock of a FlowMatchEulerDiscreteScheduler's config for an image of ``tokens`` patches.

    With dynamic shifting mu is linear in the tokens unless given, and s = e^mu ("exponential") or mu ("linear").
    """
    terminal = scheduler.get("shift_terminal") or None
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if scheduler.get(key):
            raise ValueError(f"the pipeline's scheduler has {key}, which is not supported; set it to false")
    if not scheduler.get("use_dynamic_shifting"):
        return FlowClock(float(scheduler.get("shift", 1.0)), terminal)
    mu = dynamic_mu(scheduler, tokens) if mu is None else mu
    shift = mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
    return FlowClock(shift, terminal)


def dynamic_mu(scheduler: Mapping[str, Any], tokens: int) -> float:
    """mu = base_shift + (tokens - base_tokens) (max_shift - base_shift) / (max_tokens - base_tokens) (FLUX.1)."""
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return float(base + (tokens - low) * (top - base) / (high - low))


@dataclass(frozen=True)
class VpClock:
    """t = t_1000 / (T - 1) with the training steps t_1000 = 0 ... T - 1."""

    train_steps: int = 1000

    def times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        """u -> t_1000 = round(T u) - 1: 1, .75, .5, .25 are the steps 999, 749, 499, 249 ("trailing" spacing)."""
        return tuple(max(round(self.train_steps * u) - 1, 0) / (self.train_steps - 1) for u in uniform)

    def t_1000(self, t: Tensor) -> Tensor:
        """The time that the network reads, fp32."""
        return t.float() * (self.train_steps - 1)


def vp_schedule(scheduler: Mapping[str, Any]) -> VpSchedule:
    """The schedule of a scheduler's config. ValueError for what is not epsilon-prediction on scaled_linear betas."""
    wanted = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon", "trained_betas": None}
    for key, value in wanted.items():
        if scheduler.get(key, value) != value:
            raise ValueError(f"the pipeline's scheduler has {key} = {scheduler[key]!r}; supported is {value!r}")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("the pipeline's scheduler has rescale_betas_zero_snr, which epsilon-prediction cannot use")
    return VpSchedule(
        float(scheduler["beta_start"]), float(scheduler["beta_end"]), int(scheduler.get("num_train_timesteps", 1000))
    )
