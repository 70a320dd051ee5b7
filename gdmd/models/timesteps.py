"""Times: the shifts of flow models, and the discrete training steps of VP models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdmd.diffusion.schedule import shift_time


@dataclass(frozen=True)
class FlowClock:
    """Shifted flow times: t = s u / (1 + (s - 1) u) (arXiv 2403.03206, eq. 23), s = ``shift``.

    ``terminal`` (Qwen-Image): the teacher's last time, to which its whole path is stretched; None = no stretch.
    """

    shift: float
    terminal: float | None = None

    def times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        """Uniform times, falling from at most 1 -> the student's times; a few steps are not stretched."""
        return tuple(shift_time(u, self.shift) for u in uniform)

    def path(self, uniform: Sequence[float]) -> Tensor:
        """The teacher's times, 1 - t scaled so that the last is ``terminal``; then 0. [N + 1], fp32"""
        t = torch.tensor(self.times(uniform), dtype=torch.float64)
        if self.terminal is not None and t[-1] < 1:
            t = 1 - (1 - t) * (1 - self.terminal) / (1 - t[-1])
        return torch.cat([t, t.new_zeros(1)]).float()


def uniform_times(steps: int) -> list[float]:
    """1, (N-1)/N, ..., 1/N."""
    return [(steps - i) / steps for i in range(steps)]


Spacing = Literal["trailing", "leading", "linspace"]


@dataclass(frozen=True)
class VpClock:
    """t = step / (T - 1) with the training steps 0 ... T - 1.

    ``spacing`` and ``offset``: at which steps the pipeline samples (arXiv 2305.08891, table 2). ``keeps_noise``: its
    last prediction is noised to the first training step (set_alpha_to_one = false).
    """

    train_steps: int = 1000
    spacing: Spacing = "trailing"
    offset: int = 0
    keeps_noise: bool = True

    def times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        """u -> step round(T u) - 1: of 1000 steps 1, .75, .5, .25 are 999, 749, 499, 249 ("trailing" spacing)."""
        return tuple(max(round(self.train_steps * u) - 1, 0) / (self.train_steps - 1) for u in uniform)

    def path(self, steps: int) -> Tensor:
        """The teacher's times, those of DDIM with the pipeline's spacing; then clean data or the first step. [N + 1]"""
        last, count = self.train_steps - 1, self.train_steps
        if self.spacing == "trailing":
            at = torch.tensor([max(round(count * u) - 1, 0) for u in uniform_times(steps)])
        elif self.spacing == "leading":
            at = (torch.arange(steps) * (count // steps) + self.offset).flip(0).clamp(max=last)
        else:
            at = torch.linspace(0, last, steps, dtype=torch.float64).round().flip(0)
        end = torch.tensor([0.0 if self.keeps_noise else -1.0])
        return torch.cat([at.double(), end.double()]).div(last).float()

    def step(self, t: Tensor) -> Tensor:
        """The training step of a time, which the network reads; fp32, between two steps a fraction."""
        return t.float() * (self.train_steps - 1)
