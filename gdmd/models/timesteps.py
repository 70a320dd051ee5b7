"""Timestep mappings: from our time t in [0, 1] (0 = data) to the timesteps a model was trained with.

Flow models shift uniform times (``FlowTimesteps``); VP models such as SD1.5 and SDXL were trained on discrete steps
0 ... 999, and their network reads 999 t (``VpTimesteps``, used by ``families/sdxl.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdmd.diffusion.schedule import shift_time


@dataclass(frozen=True)
class FlowTimesteps:
    """Shifted flow times: t = s u / (1 + (s - 1) u) (arXiv 2403.03206, eq. 23), s = ``shift``.

    ``terminal`` (Qwen-Image): the teacher's last time; its times are stretched to end there. None = no stretch.
    """

    shift: float
    terminal: float | None = None

    def student(self, uniform: Sequence[float]) -> tuple[float, ...]:
        """Uniform times, descending from at most 1 -> the student's times; a few steps are not stretched."""
        return tuple(shift_time(u, self.shift) for u in uniform)

    def uniform(self, times: Sequence[float]) -> tuple[float, ...]:
        """The inverse: u = t / (s - (s - 1) t), which is a shift by 1 / s."""
        return tuple(shift_time(t, 1 / self.shift) for t in times)

    def teacher(self, uniform: Sequence[float]) -> Tensor:
        """The teacher's times, 1 - t scaled so that the last is ``terminal``; then 0. [N + 1], fp32"""
        t = torch.tensor(self.student(uniform), dtype=torch.float64)
        if self.terminal is not None and t[-1] < 1:
            t = 1 - (1 - t) * (1 - self.terminal) / (1 - t[-1])
        return torch.cat([t, t.new_zeros(1)]).float()


def uniform_times(steps: int) -> list[float]:
    """1, (N-1)/N, ..., 1/N."""
    return [(steps - i) / steps for i in range(steps)]


Spacing = Literal["trailing", "leading", "linspace"]


@dataclass(frozen=True)
class VpTimesteps:
    """t = step / (T - 1) with the training steps 0 ... T - 1, T = ``train_steps``.

    ``spacing`` and ``offset``: at which steps the pipeline samples (arXiv 2305.08891, table 2). ``ends_at_first_step``:
    its last prediction is noised to the first training step (set_alpha_to_one = false) instead of returned clean.
    """

    train_steps: int = 1000
    spacing: Spacing = "trailing"
    offset: int = 0
    ends_at_first_step: bool = True

    def student(self, uniform: Sequence[float]) -> tuple[float, ...]:
        """u -> step round(T u) - 1: of 1000 steps 1, 0.75, 0.5, 0.25 are 999, 749, 499, 249 ("trailing" spacing).

        ValueError for times of the same step, at which the student would be called twice.
        """
        at = [max(round(self.train_steps * u) - 1, 0) for u in uniform]
        if len(set(at)) < len(at):
            raise ValueError(
                f"method.student_steps {list(uniform)} are the training steps {at} of this model's {self.train_steps}, "
                "some of them twice; give times further apart, or fewer steps"
            )
        return tuple(step / (self.train_steps - 1) for step in at)

    def uniform(self, times: Sequence[float]) -> tuple[float, ...]:
        """The inverse for times of training steps: u = (step + 1) / T."""
        return tuple((round(t * (self.train_steps - 1)) + 1) / self.train_steps for t in times)

    def teacher(self, steps: int) -> Tensor:
        """The teacher's times: DDIM's with the pipeline's spacing, then clean data or the first step. [N + 1], fp32"""
        last, count = self.train_steps - 1, self.train_steps
        if self.spacing == "trailing":
            at = torch.tensor([max(round(count * u) - 1, 0) for u in uniform_times(steps)])
        elif self.spacing == "leading":
            at = (torch.arange(steps) * (count // steps) + self.offset).flip(0).clamp(max=last)
        else:
            at = torch.linspace(0, last, steps, dtype=torch.float64).round().flip(0)
        end = torch.tensor([0.0 if self.ends_at_first_step else -1.0])
        return torch.cat([at.double(), end.double()]).div(last).float()

    def network_step(self, t: Tensor) -> Tensor:
        """The training step that the network reads: 999 t of 1000 steps; fp32, fractional between two steps."""
        return t.float() * (self.train_steps - 1)
