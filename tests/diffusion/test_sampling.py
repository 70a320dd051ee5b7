"""The student's rollout: predict, re-noise with fresh noise, stop at each sample's tau, continue from there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import backward_simulation, continuation, few_step_sample, ode_sample, times
from gdmd.diffusion.schedule import FlowSchedule, VpSchedule, from_x0, renoise
from gdmd.types import Cond, Prediction, Schedule, StudentSampler

SAMPLERS: tuple[StudentSampler, ...] = ("renoise", "ode")
STEPS = (1.0, 0.75, 0.5, 0.25)
SHAPE = (2, 3, 3)
B = 7


class Student:
    """x0 depends on x_t, t and the caption of each sample; counts how many samples it has answered."""

    def __init__(self) -> None:
        self.forwards: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.forwards.append(cond["who"])
        x0 = torch.tanh(x_t * (1 + t[:, None, None, None])) + 0.1 * cond["who"][:, None, None, None]
        return from_x0(x0, x_t, t, FlowSchedule())


RNG = SampleRng(3, 5, torch.arange(B))
WHO = {"who": torch.arange(B).float()}


def noise_at(i: int) -> Tensor:
    return RNG.normal("rollout", SHAPE, i)


def naive(k: int, stop: int, sampler: StudentSampler = "renoise") -> Tensor:
    """x_tau of one sample, step by step."""
    own, student = SampleRng(3, 5, torch.tensor([k])), Student()
    x_t = own.normal("noise", SHAPE)
    for i in range(stop):
        here, there = torch.tensor([STEPS[i]]), torch.tensor([STEPS[i + 1]])
        found = student(x_t, here, {"who": torch.tensor([float(k)])})
        if sampler == "ode":  # Euler's method: the velocity is eps - x0
            x_t = x_t + (there - here) * found.velocity
        else:
            x_t = renoise(found.x0, there, own.normal("rollout", SHAPE, i + 1), FlowSchedule())
    return x_t[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_backward_simulation_equals_a_loop(sampler: StudentSampler) -> None:
    """Each sample costs ``stop`` forwards."""
    stop, student = torch.tensor([0, 3, 1, 2, 3, 0, 2]), Student()
    noise = RNG.normal("noise", SHAPE)
    x_tau = backward_simulation(student, noise, STEPS, stop, WHO, noise_at, FlowSchedule(), sampler=sampler)
    for k in range(B):
        torch.testing.assert_close(x_tau[k], naive(k, int(stop[k]), sampler), rtol=1e-5, atol=1e-5)
    spent = torch.bincount(torch.cat(student.forwards).long(), minlength=B)
    assert torch.equal(spent, stop)


def test_stop_zero_is_the_noise() -> None:
    """Backward simulation returns the noise for stop 0, and does not modify it."""
    noise, student = RNG.normal("noise", SHAPE), Student()
    before = noise.clone()
    x_tau = backward_simulation(student, noise, STEPS, torch.zeros(B, dtype=torch.int64), WHO, noise_at, FlowSchedule())
    assert torch.equal(x_tau, noise) and not student.forwards
    backward_simulation(student, noise, STEPS, torch.full((B,), 3), WHO, noise_at, FlowSchedule())
    assert torch.equal(noise, before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_rollout_equals_the_sampler(sampler: StudentSampler) -> None:
    noise, student = RNG.normal("noise", SHAPE), Student()
    last = torch.full((B,), len(STEPS) - 1)
    x_tau = backward_simulation(student, noise, STEPS, last, WHO, noise_at, FlowSchedule(), sampler=sampler)
    x0 = student(x_tau, torch.full((B,), STEPS[-1]), WHO).x0
    torch.testing.assert_close(few_step_sample(Student(), noise, STEPS, WHO, noise_at, FlowSchedule(), sampler), x0)


def never(i: int) -> Tensor:
    raise AssertionError(i)


@pytest.mark.parametrize("schedule", [FlowSchedule(), VpSchedule(zero_snr=True)])
def test_deterministic_student_samples_as_the_ode(schedule: Schedule) -> None:
    """In float64, without a draw, down to t = 0, where x is x0 (up to VP's first training step)."""

    def net(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return from_x0(torch.tanh(x_t * (1 + t[:, None, None, None])), x_t, t, schedule)

    noise = RNG.normal("noise", SHAPE).double()
    path = torch.tensor([*STEPS, 0.0], dtype=torch.float64)
    wanted = ode_sample(net, noise, path[:-1], {}, schedule)  # x at the last step
    wanted = net(wanted, path[-2].expand(B), {}).x0
    found = few_step_sample(net, noise, STEPS, {}, never, schedule, "ode")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    if isinstance(schedule, FlowSchedule):
        torch.testing.assert_close(found, ode_sample(net, noise, path, {}, schedule), rtol=1e-6, atol=1e-6)


def test_few_steps_are_predictions_with_fresh_noise_between() -> None:
    noise, student, asked = RNG.normal("noise", SHAPE), Student(), []

    def asking(i: int) -> Tensor:
        asked.append(i)
        return noise_at(i)

    x0 = few_step_sample(student, noise, STEPS, WHO, asking, FlowSchedule())
    assert asked == [1, 2, 3] and len(student.forwards) == 4
    x_t = naive(4, 3)[None]
    wanted = Student()(x_t, torch.tensor([0.25]), {"who": torch.tensor([4.0])}).x0
    torch.testing.assert_close(x0[4:5], wanted)


def test_one_step_needs_no_second_noise() -> None:
    noise = RNG.normal("noise", SHAPE)
    x0 = few_step_sample(Student(), noise, (1.0,), WHO, never, FlowSchedule())
    assert torch.equal(x0, Student()(noise, torch.ones(B), WHO).x0)


def test_rollouts_carry_no_gradient() -> None:
    weight = torch.tensor(0.5, requires_grad=True)

    def net(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return from_x0(weight * x_t, x_t, t, FlowSchedule())

    noise = RNG.normal("noise", SHAPE)
    stop = torch.full((B,), 2)
    assert not backward_simulation(net, noise, STEPS, stop, WHO, noise_at, FlowSchedule()).requires_grad


def test_times_run_from_noise_to_data_and_never_rise() -> None:
    t = times(50, shift=3.0)
    assert len(t) == 51 and t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()


def test_an_ode_step_of_the_flow_is_euler() -> None:
    x_t, t = RNG.normal("noise", SHAPE), torch.tensor([0.8, 0.5])
    velocity = Student()(x_t, torch.full((B,), 0.8), WHO).velocity
    torch.testing.assert_close(
        ode_sample(Student(), x_t, t, WHO, FlowSchedule()), x_t + (0.5 - 0.8) * velocity, rtol=1e-5, atol=1e-5
    )


def test_an_ode_step_of_vp_is_ddim() -> None:
    schedule, x_t = VpSchedule(), RNG.normal("noise", SHAPE)

    def net(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return from_x0(torch.tanh(x), x, t, schedule)

    here, there = torch.tensor([0.8]), torch.tensor([0.5])
    eps = (x_t - schedule.alpha(here) * torch.tanh(x_t)) / schedule.sigma(here)
    wanted = schedule.alpha(there) * torch.tanh(x_t) + schedule.sigma(there) * eps
    torch.testing.assert_close(ode_sample(net, x_t, torch.cat([here, there]), {}, schedule), wanted)


class Affine:
    """A student whose x0 and eps depend on every argument, and that counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.calls.append(len(x_t))
        shift = cond["shift"][:, None, None, None]
        return Prediction(x0=(0.3 + t[:, None, None, None]) * x_t + shift, eps=0.5 * x_t - shift)


def draw(purpose: str, i: int = 0) -> Tensor:
    seed = sum(map(ord, purpose)) + i
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_stopped_and_continued_rollout_is_the_sampler() -> None:
    student, stop = Affine(), torch.tensor([0, 1, 2, 1])
    cond = {"shift": torch.tensor([0.1, 0.2, -0.3, 0.4], dtype=torch.float64)}
    again = lambda i: draw("again", i)  # noqa: E731
    whole = few_step_sample(student, draw("start"), STEPS, cond, again, FlowSchedule())
    x_tau = backward_simulation(student, draw("start"), STEPS, stop, cond, again, FlowSchedule())
    x0 = student(x_tau, torch.tensor(STEPS, dtype=torch.float64)[stop], cond).x0
    student.calls.clear()
    end = continuation(student, x0, stop, STEPS, cond, again, FlowSchedule())
    torch.testing.assert_close(end, whole, rtol=1e-6, atol=1e-6)
    assert sum(student.calls) == sum(3 - s for s in stop.tolist())


def test_the_last_step_is_repeated_from_fresh_noise() -> None:
    student, stop = Affine(), torch.full((4,), 3)
    cond = {"shift": torch.zeros(4, dtype=torch.float64)}
    end = continuation(student, draw("x0"), stop, STEPS, cond, lambda i: draw("again", i), FlowSchedule())
    x_t = 0.75 * draw("x0") + 0.25 * draw("again", 3)
    torch.testing.assert_close(end, (0.3 + 0.25) * x_t, rtol=1e-6, atol=1e-6)
    assert student.calls == [4]


def test_deterministic_continuation_has_one_fresh_draw() -> None:
    """Only the step after the stop of the rollout has fresh noise; two draws give two different results."""
    stop, cond = torch.tensor([0, 1, 2, 3]), {"shift": torch.tensor([0.1, 0.2, -0.3, 0.4], dtype=torch.float64)}
    student, again = Affine(), lambda i: draw("again", i)  # noqa: E731
    end = continuation(student, draw("x0"), stop, STEPS, cond, again, FlowSchedule(), sampler="ode")
    for k, entry in enumerate((1, 2, 3, 3)):
        own, t = {"shift": cond["shift"][k : k + 1]}, torch.tensor(STEPS[entry:], dtype=torch.float64)
        x_t = (1 - t[0]) * draw("x0")[k : k + 1] + t[0] * again(entry)[k : k + 1]
        for here, there in zip(t[:-1], t[1:], strict=True):
            found = student(x_t, here[None], own)
            x_t = (1 - there) * found.x0 + there * found.eps
        torch.testing.assert_close(end[k : k + 1], student(x_t, t[-1:], own).x0, rtol=1e-6, atol=1e-6)
    other = continuation(student, draw("x0"), stop, STEPS, cond, lambda i: draw("b", i), FlowSchedule(), sampler="ode")
    assert (end - other).abs().flatten(1).amax(1).min() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_together_only_changes_the_calls(sampler: StudentSampler) -> None:
    stop, cond = torch.tensor([3, 2, 3, 2]), {"shift": torch.ones(4, dtype=torch.float64)}
    ends, calls = [], []
    for together in (False, True):
        student = Affine()
        again = lambda i: draw("again", i)  # noqa: E731
        given = (draw("x0"), stop, STEPS, cond, again, FlowSchedule())
        ends.append(continuation(student, *given, together=together, sampler=sampler))
        calls.append(student.calls)
    assert torch.equal(*ends) and calls == [[4], [1, 1, 4]]


def test_one_step_has_no_continuation() -> None:
    stop = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="has no step after the first"):
        continuation(Affine(), draw("x0"), stop, (1.0,), {}, lambda i: draw("a"), FlowSchedule())
