"""Tiny random networks, toy rewards and a plain SGD driver, for tests of the methods on real Updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from gdmd.config.methods.all import MethodConfig
from gdmd.data.prompts import batch_of
from gdmd.diffusion.rng import SampleRng
from gdmd.losses.dmd import dmd_loss
from gdmd.methods.dmd import Dmd
from gdmd.methods.gdmd import Gdmd
from gdmd.methods.gdmd_tilted import GdmdTilted
from gdmd.recipes.build import SHAPES, method_of
from gdmd.shapes.networks import ShapesDit
from gdmd.shapes.roles import LATENT_SHAPE, ShapesRoles, ShapesTextEncoder
from gdmd.types import Cond, Denoiser, Method, Prediction, PromptBatch, Reward, Role, Update

TEXTS = ("a circle", "a red square", "two rings", "a circle and a square")
LR = 0.02


def tiny_roles(seed: int = 0, *, head: bool = False) -> ShapesRoles:
    """Teacher, student and fake score that differ, with no layer left at zero; ``head``: a GAN head, too."""
    torch.manual_seed(seed)
    roles = ShapesRoles(_awake(ShapesDit(width=32, depth=1)), head_seed=5 if head else None)
    with torch.no_grad():
        for role in ("student", "fake"):
            for parameter in roles.parameters(role).values():  # type: ignore[arg-type]
                parameter.add_(0.03 * torch.randn_like(parameter))
    return roles


def _awake(net: ShapesDit) -> ShapesDit:
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return net


def prompts(texts: tuple[str, ...] = TEXTS) -> PromptBatch:
    return batch_of(texts, ShapesTextEncoder())


def rng(step: int = 0, batch: PromptBatch | None = None) -> SampleRng:
    return SampleRng(11, step, (batch or prompts()).index)


class ToyCodec:
    """Three channels through a sigmoid; remembers what it was shown."""

    def __init__(self) -> None:
        self.gain = torch.tensor(1.0, requires_grad=True)
        self.shown: list[Tensor] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.shown.append(latents)
        return torch.sigmoid(self.gain * latents[:, :3])

    def encode(self, images: Tensor) -> Tensor:
        return images


@dataclass
class Toy:
    """factor x brightness of a channel + offset, NaN for the samples in ``unscored``."""

    name: str = "brightness"
    channel: int = 0
    factor: float = 1.0
    offset: float = 0.0
    unscored: tuple[int, ...] = ()
    differentiable: bool = True
    gain: Tensor = field(default_factory=lambda: torch.tensor(1.0, requires_grad=True))

    def score(self, images: Tensor, batch: PromptBatch) -> Tensor:
        scores = self.gain * (self.factor * images[:, self.channel].mean((1, 2)) + self.offset)
        return torch.where(torch.isin(batch.index, torch.tensor(self.unscored)), torch.nan, scores)


def real_latents(batch: PromptBatch, draws: SampleRng) -> Tensor:
    """Stand-ins for encoded images."""
    return 2 + draws.normal("real", LATENT_SHAPE)


def make(kind: str, roles: ShapesRoles, *rewards: Reward, codec: ToyCodec | None = None, **options: Any) -> Any:
    """The method of that kind on tiny networks, by the same function that recipes use."""
    cfg: Any = TypeAdapter(MethodConfig).validate_python({"kind": kind, **options})
    return method_of(cfg, roles, codec or ToyCodec(), rewards or (Toy(),), SHAPES, real_latents)


def gdmd(roles: ShapesRoles, *rewards: Reward, **options: Any) -> Gdmd:
    return make("gdmd", roles, *rewards, **{"group_size": 3, **options})


def tilted(roles: ShapesRoles, *rewards: Reward, kind: str = "gdmd_tilted", **options: Any) -> GdmdTilted:
    small = {"group_size": 3, "continuations": 3, "continuation_weight": 1.0}
    return make(kind, roles, *rewards, **small | options)


def dmd(roles: ShapesRoles, **options: Any) -> Dmd:
    return make("dmd", roles, **options)


def apply(update: Update, roles: ShapesRoles) -> None:
    """One step of plain SGD."""
    parameters = list(roles.parameters(update.role).values())
    grads = torch.autograd.grad(update.loss(update.batch).per_sample.mean(), parameters)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.sub_(LR * grad)


def updates(
    method: Method, roles: ShapesRoles, step: int = 0, role: Role | None = None, batch: PromptBatch | None = None
) -> Iterator[Update]:
    """The updates of one iteration, each handed out before it is applied."""
    batch = batch or prompts()
    for update in method.iteration(step, batch, rng(step, batch)):
        if role in (None, update.role):
            yield update
        apply(update, roles)


def train(
    method: Method, roles: ShapesRoles, steps: int = 2, start: int = 0, batch: PromptBatch | None = None
) -> dict[str, Tensor]:
    """Weights of student and fake after some iterations."""
    for step in range(start, start + steps):
        for _ in updates(method, roles, step, batch=batch):
            pass
    return weights(roles)


def weights(roles: ShapesRoles) -> dict[str, Tensor]:
    both: tuple[Role, Role] = ("student", "fake")
    return {f"{role}.{k}": p.detach().clone() for role in both for k, p in roles.parameters(role).items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of a weight."""
    return max((a[k] - b[k]).abs().max().item() for k in a)


def student_gradient(update: Update, roles: ShapesRoles, loss: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The gradient of the mean loss, all parameters in one vector."""
    value = update.loss(update.batch).per_sample if loss is None else loss(update.batch)
    grads = torch.autograd.grad(value.mean(), list(roles.parameters("student").values()))
    return torch.cat([grad.flatten() for grad in grads])


def first_student(method: Method, roles: ShapesRoles) -> Update:
    """The first student update of an iteration whose fake updates were applied."""
    return next(updates(method, roles, role="student"))


def scored(method: Gdmd, roles: ShapesRoles, step: int = 0) -> Tensor:
    """r of every student update of one iteration, [eta, B]."""
    return torch.stack([update.batch.r for update in updates(method, roles, step, "student")])


def plain_dmd(roles: ShapesRoles, batch: Any) -> Tensor:
    """L_DMD per sample of a student batch."""
    return dmd_loss(roles.student(batch.x_tau, batch.tau, batch.cond).x0, batch.x_tar)


def cut(value: Any, start: int, stop: int) -> Any:
    """A slice of samples of a batch of nested dataclasses, mappings and tensors."""
    if isinstance(value, Tensor):
        return value[start:stop]
    if isinstance(value, Mapping):
        return {k: cut(v, start, stop) for k, v in value.items()}
    parts = {f.name: cut(getattr(value, f.name), start, stop) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **parts)


@dataclass
class Watched:
    """A denoiser that appends its calls to a list shared with others."""

    name: str
    denoiser: Denoiser
    diary: list[Call]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        prediction = self.denoiser(x_t, t, cond)
        self.diary.append(Call(self.name, x_t, t, cond, prediction.x0))
        return prediction


@dataclass(frozen=True)
class Call:
    name: str
    x_t: Tensor
    t: Tensor
    cond: Cond
    x0: Tensor


def grouped(size: int = 4) -> PromptBatch:
    """Two prompts, ``size`` images of each."""
    index = torch.arange(2 * size)
    return batch_of(("a circle",) * size + ("two rings",) * size, ShapesTextEncoder(), index, index // size)


def watch(roles: ShapesRoles) -> list[Call]:
    """Record the calls of teacher, fake, student and old; returns the record."""
    diary: list[Call] = []
    for name in ("teacher", "fake", "student", "old"):
        setattr(roles, name, Watched(name, getattr(roles, name), diary))
    return diary
