"""Guidance costs one batched teacher call, nothing at scale 1, and belongs to the teacher alone."""

from __future__ import annotations

from typing import Any

import torch
from tiny_roles import Call, first_student, gdmd, prompts, rng, tiny_roles, train, watch

from gdmd.diffusion.guidance import Guided
from gdmd.diffusion.sampling import ode_sample, times

SIZE = 4


def teacher_calls(**options: Any) -> list[Call]:
    roles = tiny_roles()
    diary = watch(roles)
    first_student(gdmd(roles, group_size=2, **options), roles)
    return [call for call in diary if call.name == "teacher"]


def test_guidance_one_runs_no_unconditional_pass() -> None:
    calls = teacher_calls(guidance=1.0)
    assert [len(call.t) for call in calls] == [SIZE, SIZE]
    assert all(torch.equal(call.cond["tokens"], prompts().cond["tokens"]) for call in calls)


def test_guidance_runs_both_passes_in_one_call() -> None:
    """Both at the same x_t."""
    batch = prompts()
    for call in teacher_calls(guidance=5.0):
        assert torch.equal(call.cond["tokens"], torch.cat([batch.cond["tokens"], batch.uncond["tokens"]]))
        assert torch.equal(call.x_t[:SIZE], call.x_t[SIZE:]) and torch.equal(call.t[:SIZE], call.t[SIZE:])


def test_student_fake_and_old_policy_are_never_guided() -> None:
    roles = tiny_roles()
    diary = watch(roles)
    train(gdmd(roles, old_policy="ema", guidance=5.0), roles, 1)
    others = [call for call in diary if call.name != "teacher"]
    assert {call.name for call in others} == {"student", "fake", "old"}
    own = prompts().cond["tokens"]
    assert all(len(call.t) <= SIZE and (call.cond["tokens"][:, None] == own).all(2).any(1).all() for call in others)


def test_guidance_one_is_the_plain_sampler() -> None:
    """It gives the same images at half the cost."""
    batch, noise = prompts(), rng().normal("x", (8, 8, 8))
    runs = []
    for guidance in (None, 1.0, 2.0):
        roles = tiny_roles()
        diary = watch(roles)
        denoiser = roles.teacher if guidance is None else Guided(roles.teacher, guidance, batch.uncond)
        runs.append((ode_sample(denoiser, noise, times(3), batch.cond, roles.schedule), [len(c.t) for c in diary]))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1] == [SIZE] * 3
    assert not torch.equal(runs[0][0], runs[2][0]) and runs[2][1] == [2 * SIZE] * 3


def test_guidance_reaches_the_targets_linearly() -> None:
    def target(guidance: float) -> torch.Tensor:
        roles = tiny_roles()
        return first_student(gdmd(roles, guidance=guidance, normalize=False, group_size=1), roles).batch.x_tar

    at = {guidance: target(guidance) for guidance in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(at[3.0] - at[0.0], 3 * (at[1.0] - at[0.0]), rtol=1e-3, atol=1e-4)
    assert (at[1.0] - at[0.0]).abs().mean() > 1e-3
