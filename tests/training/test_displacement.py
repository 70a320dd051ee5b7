"""A student that hardly moves is noticed early: the measure, the warning, and a run without one."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_roles import prompts, tiny_roles
from toy_training import Toy, toy_config

from gdmd.config.training import LoopConfig
from gdmd.runs.run_folder import read_metrics
from gdmd.shapes.roles import LATENT_SHAPE, ShapesTextEncoder
from gdmd.training.displacement import MOVED, SAMPLES, STUCK, displacement, displacement_hook, hardly_moves
from gdmd.training.loop import Hooks, NoProgress

STEPS = (1.0, 0.5)


class Notes(NoProgress):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def note(self, message: str) -> None:
        self.seen += [message] if "hardly moves" in message else []


def test_displacement_in_spreads_of_the_teacher() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(16).reshape(2, 1, 4, 4)
    teacher = torch.cat([5 + 2 * signs, -3 - 2 * signs], 1)  # spread 2 around the channel means 5 and -3
    assert displacement(teacher, teacher) == 0
    assert displacement(teacher + 1, teacher).item() == pytest.approx(0.5)
    assert displacement(teacher + signs, teacher).item() == pytest.approx(0.5)
    noise = torch.randn(2, 64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert displacement(noise[0], noise[1]).item() == pytest.approx(math.sqrt(2), rel=0.01)


def test_hook_compares_the_student_with_the_teacher() -> None:
    roles = tiny_roles()
    parts = SimpleNamespace(roles=roles, encoder=ShapesTextEncoder(), latent_shape=LATENT_SHAPE)
    loop = LoopConfig(batch_size=4)
    student, teacher = roles.parameters("student"), dict(roles.teacher.net.named_parameters())
    start = {name: own.detach().clone() for name, own in student.items()}
    measure = displacement_hook(parts, prompts().text, STEPS, loop, 1)

    def moved_to(share: float) -> float:
        with torch.no_grad():
            for name, own in student.items():
                own.copy_(torch.lerp(teacher[name], start[name], share))
        return measure()[MOVED]

    small, half, whole = (moved_to(share) for share in (0.001, 0.5, 1.0))
    assert moved_to(0) == 0 < small < half < whole
    assert half / small == pytest.approx(500, rel=0.5), "small displacements are linear in those of the weights"
    again = displacement_hook(parts, prompts().text, STEPS, loop, 1)  # as after a resume
    moved_to(0.5)
    assert again()[MOVED] == half
    assert len(prompts()) < SAMPLES, "few prompts are repeated"
    assert displacement_hook(parts, prompts().text, STEPS, LoopConfig(batch_size=32), 4)()[MOVED] > 0


@pytest.mark.parametrize(
    ("step", "updates", "moved", "warned"),
    [
        (100, 100, 80 / 980 * STUCK * 0.99, True),  # the warm-up of 40 updates moves it half as far
        (100, 100, 80 / 980 * STUCK * 1.01, False),
        (500, 500, 0.4 * STUCK, True),
        (500, 500, math.nan, False),
        (99, 99, 0.0, False),  # too early in the run
        (100, 39, 0.0, False),  # in the warm-up
    ],
)
def test_when_a_student_hardly_moves(step: int, updates: int, moved: float, warned: bool) -> None:
    loop = LoopConfig(steps=1000, warmup=40, lr_student=3e-5)
    values = {"updates/student": updates, MOVED: moved}
    message = hardly_moves(step, values, loop)
    assert bool(message) == warned
    assert not warned or "loop.lr_student = 3e-05" in message and "rewards" not in message
    scored = hardly_moves(step, values | {"scores/clip/unscored": 0.0}, loop)
    assert ("Check the rewards" in scored) == warned
    assert hardly_moves(step, {"updates/student": updates}, loop) == ""  # not measured


@pytest.mark.parametrize(("schedule", "share"), [("constant", 0.5), ("linear", 0.75), ("cosine", 0.5 + 1 / math.pi)])
def test_extrapolation_follows_the_schedule(schedule: str, share: float) -> None:
    """``share``: of the sum of the learning rates, after half of the steps."""
    loop = LoopConfig(steps=1000, lr_schedule=schedule)
    below, above = ({"updates/student": 500, MOVED: factor * share * STUCK} for factor in (0.99, 1.01))
    assert hardly_moves(500, below, loop) and not hardly_moves(500, above, loop)


def trained(folder: Path, lr: float, steps: int = 40) -> tuple[Toy, list[str]]:
    toy, notes = Toy(folder, toy_config(steps, lr_student=lr)), Notes()
    x_t, t = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    first = Toy(folder, toy.cfg).roles.student(x_t, t, {}).x0.reshape(4, 1, 2, 3)  # as the teacher of a real run

    @torch.no_grad()
    def measure() -> dict[str, float]:
        return {MOVED: float(displacement(toy.roles.student(x_t, t, {}).x0.reshape(4, 1, 2, 3), first))}

    toy.hooks = Hooks(notes, at_log=measure)
    toy.train()
    return toy, notes.seen


def test_stuck_run_is_reported_once_and_a_healthy_one_is_not(tmp_path: Path) -> None:
    healthy, none = trained(tmp_path / "healthy", 1e-2)
    _, warned = trained(tmp_path / "dead", 1e-5)
    assert none == [] and len(warned) == 1 and "after 20 updates" in warned[0]
    moved = [row[MOVED] for row in read_metrics(tmp_path / "healthy")]
    assert moved[0] < moved[9] < moved[-1]
    plain = Toy(tmp_path / "plain", healthy.cfg)
    plain.train()
    for name, weights in plain.roles.parameters("student").items():
        assert torch.equal(weights, healthy.roles.parameters("student")[name]), "measuring changes no training"


def test_warning_after_a_resume(tmp_path: Path) -> None:
    _, early = trained(tmp_path / "run", 1e-5, steps=8)  # 16 updates: not judged yet
    _, warned = trained(tmp_path / "run", 1e-5)
    assert early == [] and len(warned) == 1 and "after 20 updates" in warned[0]
