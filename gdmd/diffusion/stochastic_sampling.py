"""The few-step student as a stochastic policy: coefficients-preserving steps and their log-probability.

Coefficients-preserving sampling (CPS) is arXiv 2509.05952, eq. 12, as in the code of Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.diffusion.sampling import NoiseAt
from gdmd.diffusion.schedule import expand
from gdmd.types import Cond, Denoiser, Prediction, Schedule


@dataclass(frozen=True)
class Trajectory:
    """One stochastic rollout per sample over N steps, without gradient."""

    x: Tensor  # [B, N, C, H, W], the states at the steps t_1 > ... > t_N; x[:, 0] is noise
    log_prob: Tensor  # [B, N - 1], of the moves x[:, i] -> x[:, i + 1] under the policy that sampled them
    x0: Tensor  # [B, C, H, W], the finished sample: the prediction at the last step


def cps_mean(prediction: Prediction, t_next: Tensor, noise_level: float, schedule: Schedule) -> Tensor:
    """alpha(s') x0 + sigma(s') cos(th) eps, th = noise_level pi / 2: the mean of the next state. [B, C, H, W]

    prediction: of the network at the current state; t_next = s' [B]; noise_level in [0, 1]. Flow: (1 - s') x0 + ...
    """
    x0 = prediction.x0
    alpha, sigma = expand(schedule.alpha(t_next), x0), expand(schedule.sigma(t_next), x0)
    if noise_level == 1:  # cos(pi / 2) is 6e-17 in floating point; and eps may be undefined at t = 0
        return alpha * x0
    return alpha * x0 + sigma * math.cos(noise_level * math.pi / 2) * prediction.eps


def cps_step(prediction: Prediction, t_next: Tensor, noise: Tensor, noise_level: float, schedule: Schedule) -> Tensor:
    """x' = alpha(s') x0 + sigma(s') (cos(th) eps + sin(th) n): the signal and noise of x' are those of its time s'.

    noise_level 0 is the deterministic step (DDIM, Euler), 1 the student's own re-noising. [B, C, H, W]
    """
    sigma = expand(schedule.sigma(t_next), noise)
    return cps_mean(prediction, t_next, noise_level, schedule) + sigma * math.sin(noise_level * math.pi / 2) * noise


def cps_log_prob(x_next: Tensor, mean: Tensor) -> Tensor:
    """-|| sg(x') - mean ||^2, mean over C, H, W: the log-probability of a step without its constants. [B]

    As in Flow-GRPO's code for CPS, the variance of the step, a constant, is left out too, so that early steps (much
    noise) count more. Gradient: 2 (x' - mean) / (C H W), into the mean only.
    """
    return -(x_next.detach() - mean).square().flatten(1).mean(1)


@torch.no_grad()
def stochastic_rollout(
    student: Denoiser,
    noise: Tensor,
    steps: Sequence[float],
    cond: Cond,
    noise_at: NoiseAt,
    schedule: Schedule,
    noise_level: float,
) -> Trajectory:
    """The student's few-step sampler with CPS moves; noise_level 1 is ``sampling.few_step_sample``. noise [B, C, H, W]"""
    states, log_probs = [noise], []
    prediction = student(noise, torch.full((len(noise),), steps[0], device=noise.device), cond)
    for i in range(1, len(steps)):
        t = torch.full((len(noise),), steps[i], device=noise.device)
        states.append(cps_step(prediction, t, noise_at(i), noise_level, schedule))
        log_probs.append(cps_log_prob(states[-1], cps_mean(prediction, t, noise_level, schedule)))
        prediction = student(states[-1], t, cond)
    log_prob = torch.stack(log_probs, 1) if log_probs else noise.new_zeros(len(noise), 0)
    return Trajectory(torch.stack(states, 1), log_prob, prediction.x0)
