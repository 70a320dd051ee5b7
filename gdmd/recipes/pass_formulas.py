"""What one iteration of a method costs by its own algorithm, to be compared with what hooks count.

The unit is F, one denoiser forward on the batch; a backward counts two more, so a trained call is 3 F, and one more through
a frozen network with adapters: 2 F. Guidance makes the teacher's call 2 F. Decoder and rewards are left out, as in
``passes``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.config.methods.all import MethodConfig
from gdmd.config.methods.base import DistillationConfig
from gdmd.config.methods.dmd import DmdConfig
from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.methods.dmd_reward import DmdGrpoConfig, DmdNftConfig, DmdReflConfig
from gdmd.config.methods.dmdr import DmdrConfig
from gdmd.config.methods.gdmd import GdmdConfig
from gdmd.config.methods.gdmd_tilted import GdmdTiltedConfig
from gdmd.diffusion.rng import SampleRng
from gdmd.methods.pass_counter import BACKWARD


@dataclass(frozen=True)
class Trained:
    """F of a call with its backward pass, by role."""

    student: float = 1 + BACKWARD
    fake: float = 1 + BACKWARD


FULL = Trained()
"""All weights of both roles are trained."""


def every_place(method: DistillationConfig) -> Tensor:
    """Each step once: tau is uniform over the N steps, so their mean cost is the expected one. [N] int64"""
    return torch.arange(len(method.student_steps))


def drawn_places(method: DistillationConfig, rng: SampleRng) -> Tensor:
    """The places of the steps that an iteration really draws. [B] int64"""
    index = rng.index if method.step_draw == "sample" else rng.index * 0
    return SampleRng(rng.seed, rng.step, index).integer("tau", len(method.student_steps))


def iteration_passes(
    method: MethodConfig, step: int, places: Tensor, reading: float = 1.0, trained: Trained = FULL
) -> float:
    """F of iteration ``step`` whose samples are trained at the steps ``places``: each costs as many forwards before.

    ``reading``: F of a forward that is made for features only (a UNet's ends in its middle).
    """
    depth = 0.0 if method.student_input == "data" else float(places.float().mean())
    rollout, score = depth + 1, (1 if method.guidance == 1 else 2) + 1  # teacher, then fake
    match method:
        case GdmdConfig():
            old = 1 if method.old_policy == "ema" else 0
            return rollout + old + method.group_size * (trained.fake + score + trained.student)
        case GdmdTiltedConfig():
            rollout += method.continuations * _tail(method, places) if method.rewarded else 0
            return rollout + method.group_size * (trained.fake + score + trained.student)
        case Dmd2Config():
            judged = (
                trained.fake * reading if method.adversarial else 0
            )  # a head's trunk is the fake: real and student latents
            return rollout + method.fake_updates * (trained.fake + 2 * judged) + score + trained.student + judged
        case DmdrConfig():
            return rollout + method.fake_updates * trained.fake + score + _dmdr_student(method, step, trained.student)
        case DmdConfig() | DmdReflConfig() | DmdNftConfig() | DmdGrpoConfig():
            updates = method.student_updates * (score + trained.student)
            return rollout + method.fake_updates * trained.fake + updates + _added(method, step, trained.student)


def _tail(method: DistillationConfig, places: Tensor) -> float:
    """Mean F of the steps after ``places``; after the last one it is made again."""
    return float((len(method.student_steps) - 1 - places).clamp_min(1).float().mean())


def _dmdr_student(method: DmdrConfig, step: int, trained: float) -> float:
    """Stage 1 finishes a picture for its tilt; stage 2 adds what its strategy needs."""
    steps = len(method.student_steps)
    if step < method.cold_start:
        return trained + (steps if method.tilt > 0 else 0)
    if method.rl_weight == 0 or method.strategy == "refl":
        return trained
    if method.strategy == "grpo":
        return trained + steps + trained * (steps - 1)
    return trained + steps + 2 + 2 * trained  # dpo: the reference and the student on winner and loser


def _added(method: DmdConfig | DmdReflConfig | DmdNftConfig | DmdGrpoConfig, step: int, trained: float) -> float:
    """What comes to DMD's own calls: pairs of the teacher's ODE, or scored roll-outs and their loss."""
    steps, updates = len(method.student_steps), method.student_updates
    match method:
        case DmdConfig() if method.regression_weight > 0:
            solved = not method.regression_batches or step < method.regression_batches
            guided = 1 if method.guidance == 1 else 2
            return solved * method.regression_steps * guided + updates * trained
        case DmdNftConfig() if method.rl_weight > 0:
            return steps + updates * (1 + trained)  # the old policy, then the student at the scored sample
        case DmdGrpoConfig() if method.rl_weight > 0:
            return steps + updates * trained * (steps - 1)
        case _:
            return 0.0
