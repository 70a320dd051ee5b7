"""Do the reward and DMD gradients of a student point in the same direction? (arXiv 2604.19009, Fig. 4)

Works for any method: the gradients of one iteration are computed twice with identical draws, by the method and by the
same method with reward weight 0, which is plain DMD. Nothing is applied. In the student's parameter space, summed over
all student updates of the iteration,

    g_RL = g_full - g_DMD,    cosine = <g_RL, g_DMD> / (|g_RL| |g_DMD|),    weight = <g_full, g_DMD> / |g_DMD|^2.

A second measure is what an iteration changes: the rewards of the student's one-step prediction x0 from fixed x_tau,
before and after the iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import backward_simulation
from gdmd.types import Cond, Method, PromptBatch, Role, Roles, StudentSampler, Update


@dataclass(frozen=True)
class Divergence:
    """cosine of g_RL and g_DMD (NaN: no RL gradient), ratio |g_RL| / |g_DMD|, weight: step length along DMD."""

    cosine: float
    ratio: float
    weight: float


@dataclass(frozen=True)
class Fixed:
    """States from which the student predicts x0 before and after an iteration."""

    x_tau: Tensor  # [B, C, H, W]
    tau: Tensor  # [B]
    cond: Cond


def student_gradient(method: Method, roles: Roles, step: int, prompts: PromptBatch, rng: SampleRng) -> Tensor:
    """Sum of the gradients of mean_B(loss) over the student updates of one iteration, none applied. [P], float64"""
    parameters = list(roles.parameters("student").values())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=parameters[0].device)
    for update in method.iteration(step, prompts, rng):
        if update.role != "student":
            continue
        loss = update.loss(update.batch).per_sample.mean()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total += torch.cat([grad.flatten() for grad in grads]).double()
    return total


def divergence(full: Tensor, plain: Tensor) -> Divergence:
    """Compare the gradients of the method and of plain DMD on the same draws, both [P]."""
    reward, norm = full - plain, plain.norm()
    cosine = reward @ plain / (reward.norm() * norm)  # 0 / 0 is NaN: no direction
    return Divergence(float(cosine), float(reward.norm() / norm), float(full @ plain / norm.square()))


@torch.no_grad()
def fixed_states(
    roles: Roles,
    prompts: PromptBatch,
    rng: SampleRng,
    steps: Sequence[float],
    shape: tuple[int, int, int],
    sampler: StudentSampler = "renoise",
) -> Fixed:
    """x_tau from the student's rollout to one of its steps, drawn uniformly."""
    stop = rng.on_host().integer("diagnosis_tau", len(steps))
    noise = rng.normal("diagnosis_noise", shape)
    renoise = lambda i: rng.normal("diagnosis_rollout", shape, i)  # noqa: E731
    x_tau = backward_simulation(
        roles.student, noise, steps, stop, prompts.cond, renoise, roles.schedule, sampler=sampler
    )
    return Fixed(x_tau, to_device_async(torch.tensor(steps)[stop], x_tau.device), prompts.cond)


def realized_change(
    iterate: Callable[[], int], roles: Roles, fixed: Fixed, score: Callable[[Tensor], Mapping[str, Tensor]]
) -> dict[str, float]:
    """Change of every reward per student update, in units of its spread over the batch before.

    iterate: applies one outer iteration and returns the number of student updates. score: x0 [B, C, H, W] -> name ->
    [B]. Samples without a score (NaN) are left out; a reward without spread gives NaN.
    """
    before = score(_x0(roles, fixed))
    updates = iterate()
    after = score(_x0(roles, fixed))
    return {name: _relative(before[name], after[name]) / updates for name in before}


def apply_iteration(
    method: Method, apply: Mapping[Role, Callable[[Update], object]], step: int, prompts: PromptBatch, rng: SampleRng
) -> int:
    """Run one outer iteration, applying each update with its role's function; returns the number of student updates."""
    updates = 0
    for update in method.iteration(step, prompts, rng):
        apply[update.role](update)
        updates += update.role == "student"
    return updates


@torch.no_grad()
def _x0(roles: Roles, fixed: Fixed) -> Tensor:
    return roles.student(fixed.x_tau, fixed.tau, fixed.cond).x0


def _relative(before: Tensor, after: Tensor) -> float:
    scored = ~(before.isnan() | after.isnan())
    spread = before[scored].double().std()
    return float((after - before)[scored].double().mean() / torch.where(spread > 0, spread, torch.nan))
