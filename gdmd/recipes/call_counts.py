"""What a method asks of its networks, counted by running the method itself on networks of one weight.

So the count is the method's own, whatever its options; nothing is loaded and nothing large is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.config.methods.dmd2 import Dmd2Config
from gdmd.config.run import RunConfig
from gdmd.diffusion.guidance import plain
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import FlowSchedule
from gdmd.recipes.build import Place, method_of
from gdmd.types import Cond, Prediction, PromptBatch, Role

ITERATIONS = 16
"""Spread evenly over the run: the student's step is drawn, and methods with stages change on the way."""
LATENT = (1, 2, 2)
MODEL_ROLES = ("student", "fake", "teacher", "old")


@dataclass(frozen=True)
class Tally:
    """Means per outer iteration. ``passes``, ``graded``, ``decoded``, ``steered``: samples per sample of the batch.

    passes: without gradient, by role; graded: with a backward pass, by role; decoded: latents decoded and scored;
    steered: the same with a backward pass through reward and decoder. calls, graded_calls: network calls without and
    with gradient, by role; losses: losses that have calls of the second kind, by role.
    read: samples of those calls of the fake, all of them with gradient, that a GAN head's features come from.
    widest: samples of the largest call without gradient, in batches (2: guidance in one call).
    """

    updates: Mapping[Role, float]
    passes: Mapping[str, float]
    graded: Mapping[str, float]
    decoded: float
    steered: float
    calls: Mapping[str, float]
    graded_calls: Mapping[str, float]
    losses: Mapping[str, float]
    read: float
    widest: float
    old_policy: bool


@dataclass
class _Log:
    samples: Counter[tuple[str, bool]] = field(default_factory=Counter)
    calls: Counter[tuple[str, bool]] = field(default_factory=Counter)
    updates: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    widest: int = 0
    followed: bool = False

    def note(self, who: str, answer: Tensor) -> None:
        """A call of ``who`` that gave this answer, [B, ...]."""
        self.samples[who, answer.requires_grad] += len(answer)
        self.calls[who, answer.requires_grad] += 1
        if who in MODEL_ROLES and not answer.requires_grad:
            self.widest = max(self.widest, len(answer))


class _Net:
    """A denoiser of one weight; also the trunk of a critic."""

    def __init__(self, who: str, log: _Log, *, trained: bool) -> None:
        self.who, self.log, self.schedule = who, log, FlowSchedule()
        self.weight = Parameter(torch.full((1,), 0.5), requires_grad=trained)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        x0 = self.weight * x_t
        self.log.note(self.who, x0)
        return Prediction(x0, x_t - x0)


class _Critic:
    def __init__(self, net: _Net) -> None:
        self.net = net

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        x0 = self.net(x_t, t, cond).x0
        self.net.log.note("critic", x0)
        return x0.mean((1, 2, 3))


class _Roles:
    """Every role by one weight."""

    def __init__(self, log: _Log, *, judged: bool) -> None:
        self.log, self.schedule, self.guide = log, FlowSchedule(), plain
        self.student, self.fake = (_Net(who, log, trained=True) for who in ("student", "fake"))
        self.teacher, self.old = (_Net(who, log, trained=False) for who in ("teacher", "old"))
        self.critic = _Critic(self.fake) if judged else None

    def parameters(self, role: Role) -> Mapping[str, Parameter]:
        """The one weight of a role."""
        return {"weight": (self.student if role == "student" else self.fake).weight}

    def blended_teacher(self, share: float) -> _Net:
        """The teacher."""
        return self.teacher

    def follow(self, decay: float) -> None:
        """Remember that there is an old policy."""
        self.log.followed = True

    def old_state(self) -> Mapping[str, Tensor]:
        """Nothing is kept."""
        return {}

    def load_old_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""


class _Pictures:
    """Codec and reward in one: latents are their own pictures."""

    name, differentiable = "counted", True

    def __init__(self, log: _Log) -> None:
        self.log = log

    def decode(self, latents: Tensor) -> Tensor:
        self.log.note("decoder", latents)
        return latents

    def encode(self, images: Tensor) -> Tensor:
        return images

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """Different for different pictures, as an advantage needs."""
        return images.mean((1, 2, 3))


def tally(cfg: RunConfig, iterations: int = ITERATIONS) -> Tally:
    """The mean cost of an outer iteration of this recipe, in units of its batch."""
    log = _Log()
    judged = isinstance(cfg.method, Dmd2Config) and cfg.method.adversarial
    roles, pictures = _Roles(log, judged=judged), _Pictures(log)
    real = lambda prompts, rng: rng.normal("real", LATENT)  # noqa: E731
    rewards = (pictures,) if cfg.method.rewarded else ()
    method: Any = method_of(cfg.method, roles, pictures, rewards, Place(LATENT), real)
    batch = cfg.loop.batch_size
    for step in _steps(cfg.loop.steps, iterations):
        index = torch.arange(batch)
        for update in method.iteration(step, _prompts(index, cfg.method.prompt_group), SampleRng(0, step, index)):
            log.updates[update.role] += 1
            before = log.calls.copy()
            update.loss(update.batch)
            log.losses.update(who for who in MODEL_ROLES if log.calls[who, True] > before[who, True])
    return _means(log, iterations, batch)


def _steps(steps: int, iterations: int) -> Sequence[int]:
    return [int((place + 0.5) * steps / iterations) for place in range(iterations)]


def _prompts(index: Tensor, group: int) -> PromptBatch:
    cond = {"text": torch.zeros(len(index), 1)}
    return PromptBatch(index, ("",) * len(index), index // group, cond, cond)


def _means(log: _Log, iterations: int, batch: int) -> Tally:
    def share(who: str, graded: bool) -> float:
        return log.samples[who, graded] / iterations / batch

    return Tally(
        updates={"student": log.updates["student"] / iterations, "fake": log.updates["fake"] / iterations},
        passes={who: share(who, False) for who in MODEL_ROLES},
        graded={who: share(who, True) for who in MODEL_ROLES},
        decoded=share("decoder", False),
        steered=share("decoder", True),
        calls={who: log.calls[who, False] / iterations for who in MODEL_ROLES},
        graded_calls={who: log.calls[who, True] / iterations for who in MODEL_ROLES},
        losses={who: log.losses[who] / iterations for who in MODEL_ROLES},
        read=share("critic", True),
        widest=log.widest / batch,
        old_policy=log.followed,
    )
