"""Teacher prompts: only the real score reads them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_roles import TEXTS, Toy, Watched, make, prompts, rng, same, tiny_roles, train, updates, watch
from torch import Tensor, nn

from gdmd.diffusion.guidance import plain
from gdmd.diffusion.schedule import FlowSchedule
from gdmd.methods.dmd import Dmd
from gdmd.shapes.grammar import NULL
from gdmd.shapes.roles import LATENT_SHAPE, ShapesTextEncoder
from gdmd.types import Cond, Prediction, PromptBatch

TEACHER_TEXTS = ("a blue circle", "a red square", "two rings", "a red circle and a blue square")
SIZE = len(TEXTS)
METHODS: dict[str, dict[str, Any]] = {
    "dmd": {"regression_weight": 0.5, "regression_steps": 2},
    "dmd2": {"gan_weight": 0.1},
    "dmdr": {"cold_start": 1, "anneal": 4},
    "dmd_refl": {},
    "dmd_nft": {"images_per_prompt": 2},
    "dmd_grpo": {"images_per_prompt": 2},
    "gdmd": {"group_size": 2, "old_policy": "ema"},
    "gdmd_tilted": {"group_size": 2, "continuations": 2},
}


def with_teacher(texts: tuple[str, ...] = TEACHER_TEXTS) -> PromptBatch:
    return replace(prompts(), teacher_cond=ShapesTextEncoder().encode(texts))


class Listening(Toy):
    """A reward that remembers the prompts of its images."""

    heard: set[tuple[str, ...]]

    def score(self, images: Tensor, batch: PromptBatch) -> Tensor:
        self.heard = getattr(self, "heard", set()) | {batch.text}
        return super().score(images, batch)


@pytest.mark.parametrize("kind", METHODS)
def test_only_the_real_score_reads_teacher_prompts(kind: str) -> None:
    roles, reward = tiny_roles(head=kind == "dmd2"), Listening()
    diary = watch(roles)
    blended = roles.blended_teacher
    roles.blended_teacher = lambda share: Watched("teacher", blended(share), diary)  # type: ignore[method-assign]
    method = make(kind, roles, reward, guidance=3.0, **METHODS[kind])
    for step in range(2):
        for _ in updates(method, roles, step, batch=with_teacher()):
            pass
    own, other = prompts().cond["tokens"], with_teacher().real_cond["tokens"]
    seen = {name: [call for call in diary if call.name == name] for name in ("teacher", "student", "fake", "old")}
    assert seen["teacher"] and seen["student"] and seen["fake"]
    for call in seen["teacher"]:
        assert torch.equal(call.cond["tokens"][:SIZE], other) and (call.cond["tokens"][SIZE:] == NULL).all()
    for call in (*seen["student"], *seen["fake"], *seen["old"]):
        assert (call.cond["tokens"][:, None] == own).all(2).any(1).all()  # also of a part of the samples
    assert getattr(reward, "heard", {TEXTS}) == {TEXTS}


@pytest.mark.parametrize("kind", METHODS)
def test_equal_teacher_prompts_train_the_same_student(kind: str) -> None:
    """The draws do not depend on teacher prompts; other teacher prompts train another student."""

    def student(batch: PromptBatch) -> dict[str, Tensor]:
        roles = tiny_roles(head=kind == "dmd2")
        return train(make(kind, roles, guidance=3.0, **METHODS[kind]), roles, batch=batch)

    plain_student = student(prompts())
    assert same(plain_student, student(with_teacher(TEXTS)))
    assert not same(plain_student, student(with_teacher()))


class Scaled(nn.Module):
    """A denoiser whose x0 is a number times that of the caption."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return Prediction((self.factor * cond["c"])[:, None, None, None].expand_as(x_t), x_t)


def test_gradient_in_closed_form() -> None:
    """d L / d s = 2 c (x0_fake(p) - x0_teacher(p+)), x0_teacher(p+) = T (u + g (c+ - u))."""
    student, fake, teacher = Scaled(0.5), Scaled(0.75), Scaled(2.0)
    roles: Any = SimpleNamespace(schedule=FlowSchedule(), guide=plain, student=student, fake=fake, teacher=teacher)
    c, better, none = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([3.0, 2.0, 0.5]), torch.full((3,), 0.25)
    index, guidance = torch.arange(3), 1.5
    batch = PromptBatch(index, ("", "", ""), index, {"c": c}, {"c": none}, teacher_cond={"c": better})
    cfg = make("dmd", tiny_roles(), guidance=guidance, normalize=False, fake_updates=1).cfg
    method = Dmd(cfg, roles, LATENT_SHAPE, "velocity")
    update = next(update for update in method.iteration(0, batch, rng(0, batch)) if update.role == "student")
    (gradient,) = torch.autograd.grad(update.loss(update.batch).per_sample.sum(), [student.factor])
    guided = 2.0 * (none + guidance * (better - none))
    torch.testing.assert_close(gradient, (2 * c * (0.75 * c - guided)).sum())
