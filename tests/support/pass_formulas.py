"""Closed forms of what one iteration of a method costs, an independent check of the dry run (``recipes.call_counts``).

The unit is F, one denoiser forward on the batch; a backward counts two more, so a trained call is 3 F, and one more through
a frozen network with adapters: 2 F. Guidance makes the teacher's call 2 F. Decoder and rewards are left out, as in
``passes``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd.config.methods.all import MethodConfig
from gdmd.config.methods.base import DistillationConfig
from gdmd.config.methods.baseline import BaselineConfig
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.methods.dmd_reward import DMDGRPOConfig, DMDNFTConfig, DMDReFLConfig
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.methods.pass_counter import BACKWARD

TRAINED = 1 + BACKWARD
"""F of a call with its backward pass."""


def every_place(method: DistillationConfig) -> Tensor:
    """The index of each step: tau is uniform over the N steps, so their mean cost is the expected one. [N] int64"""
    return torch.arange(len(method.student_steps))


def iteration_passes(method: MethodConfig, step: int, places: Tensor) -> float:
    """F of iteration ``step`` whose samples are trained at the steps ``places``: each costs as many forwards before."""
    depth = 0.0 if method.student_input == "data" else float(places.float().mean())
    rollout, score = depth + 1, (1 if method.guidance == 1 else 2) + 1  # teacher, then fake
    match method:
        case GDMDConfig():
            old = 1 if method.old_policy == "ema" else 0
            return rollout + old + method.group_size * (TRAINED + score + TRAINED)
        case TiltedGDMDConfig():
            rollout += method.continuations * _tail(method, places) if method.rewarded else 0
            more = method.extra_fake_updates * TRAINED
            return rollout + more + method.group_size * (TRAINED + score + TRAINED)
        case DMD2Config():
            judged = TRAINED if method.adversarial else 0  # a head reads features of the fake score: real, student
            rollouts = rollout * _rollouts(method)
            return rollouts + method.fake_updates * (TRAINED + 2 * judged) + score + TRAINED + judged
        case DMDRConfig():
            rollouts = rollout * _rollouts(method) + (1 if method.renoise_x0 else 0)
            return rollouts + method.fake_updates * TRAINED + score + _dmdr_student(method, step)
        case DMDConfig() | DMDReFLConfig() | DMDNFTConfig() | DMDGRPOConfig():
            updates = method.student_updates * (score + TRAINED)
            return rollout * _rollouts(method) + method.fake_updates * TRAINED + updates + _added(method, step)


def _rollouts(method: BaselineConfig) -> int:
    """The student's batch, and one for every other fake update unless they share it."""
    return method.fake_updates if method.fake_samples == "fresh" else 1


def _tail(method: DistillationConfig, places: Tensor) -> float:
    """Mean F of the steps after ``places``; after the last one it is made again."""
    return float((len(method.student_steps) - 1 - places).clamp_min(1).float().mean())


def _dmdr_student(method: DMDRConfig, step: int) -> float:
    """Stage 1 generates a finished image for its tilt; stage 2 adds what its strategy needs."""
    steps = len(method.student_steps)
    if step < method.cold_start:
        return TRAINED + (steps if method.tilt > 0 else 0)
    if method.rl_weight == 0 or method.strategy == "refl":
        return TRAINED
    if method.strategy == "grpo":
        return TRAINED + steps + TRAINED * (steps - 1)
    return TRAINED + steps + 2 + 2 * TRAINED  # dpo: the reference and the student on winner and loser


def _added(method: DMDConfig | DMDReFLConfig | DMDNFTConfig | DMDGRPOConfig, step: int) -> float:
    """What is added to DMD's own calls: pairs of the teacher's ODE, or scored rollouts and their loss."""
    steps, updates = len(method.student_steps), method.student_updates
    match method:
        case DMDConfig() if method.regression_weight > 0:
            solved = not method.regression_batches or step < method.regression_batches
            guided = 1 if method.guidance == 1 else 2
            return solved * method.regression_steps * guided + updates * TRAINED
        case DMDNFTConfig() if method.rl_weight > 0:
            return steps + updates * (1 + TRAINED)  # the old policy, then the student at the scored sample
        case DMDGRPOConfig() if method.rl_weight > 0:
            return steps + updates * TRAINED * (steps - 1)
        case _:
            return 0.0
