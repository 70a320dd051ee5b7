"""What a method asks of its networks, counted by running the method itself on networks of one weight.

So the count is the method's own, whatever its options; nothing is loaded and nothing large is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from gdmd.recipes.build import LatentSpec, method_of
from gdmd.types import Cond, Prediction, PromptBatch, Role

ITERATIONS = 16
"""Spread evenly over the run: methods with stages change on the way."""
LATENT = (1, 2, 2)
MODEL_ROLES = ("student", "fake", "teacher", "old")


@dataclass(frozen=True)
class Tally:
    """Means per outer iteration. ``passes``, ``graded``, ``decoded``, ``steered``: samples per sample of the batch."""

    updates: Mapping[Role, float]
    passes: Mapping[str, float]  # without gradient, by role
    graded: Mapping[str, float]  # with a backward pass, by role
    decoded: float  # latents decoded and scored
    steered: float  # the same with a backward pass through reward and decoder
    calls: Mapping[str, float]  # network calls without gradient, by role
    graded_calls: Mapping[str, float]  # and with gradient
    losses: Mapping[str, float]  # losses that have calls with gradient, by role
    read: float  # samples of the fake's calls with gradient that a GAN head's features come from
    widest: float  # samples of the largest call without gradient, in batches (2: guidance in one call)
    old_policy: bool

    def forwards(self, backward: Mapping[str, float], feature_cost: float = 1.0) -> float:
        """All passes in units of one forward. backward: what a backward pass adds, by role; feature_cost: a forward that
        ends where a GAN head reads its features."""
        whole = sum(self.passes.values()) + sum(n * (1 + backward[who]) for who, n in self.graded.items() if n)
        return whole - self.read * (1 + backward["fake"]) * (1 - feature_cost)


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
    """A denoiser of one weight; also the base model of a GAN head."""

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

    def __init__(self, log: _Log, *, gan: bool) -> None:
        self.log, self.schedule, self.guide = log, FlowSchedule(), plain
        self.student, self.fake = (_Net(who, log, trained=True) for who in ("student", "fake"))
        self.teacher, self.old = (_Net(who, log, trained=False) for who in ("teacher", "old"))
        self.critic = _Critic(self.fake) if gan else None

    def parameters(self, role: Role) -> Mapping[str, Parameter]:
        """The one weight of a role."""
        return {"weight": (self.student if role == "student" else self.fake).weight}

    def blended_teacher(self, share: float) -> _Net:
        """The teacher."""
        return self.teacher

    def follow(self, decay: float) -> None:
        """Remember that there is an old policy."""
        self.log.followed = True

    def shard(self, shard: Callable[[Any], None]) -> None:
        """Nothing to do."""

    def old_state(self) -> Mapping[str, Tensor]:
        """Nothing is kept."""
        return {}

    def load_old_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""


class _Images:
    """Codec and reward in one: latents are their own images."""

    name, differentiable = "counted", True

    def __init__(self, log: _Log) -> None:
        self.log = log

    def decode(self, latents: Tensor) -> Tensor:
        self.log.note("decoder", latents)
        return latents

    def encode(self, images: Tensor) -> Tensor:
        return images

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """Different for different images, as an advantage needs."""
        return images.mean((1, 2, 3))


class DryRun:
    """The method of a recipe on networks of one weight; ``counts`` are of all iterations so far."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg, self._iterations, self._log = cfg, 0, _Log()
        gan = isinstance(cfg.method, Dmd2Config) and cfg.method.adversarial
        roles, images = _Roles(self._log, gan=gan), _Images(self._log)
        real = lambda prompts, rng: rng.normal("real", LATENT)  # noqa: E731
        rewards = (images,) if cfg.method.rewarded else ()
        self._method = method_of(cfg.method, roles, images, rewards, LatentSpec(LATENT), real)

    def iteration(self, step: int, rng: SampleRng) -> None:
        """Iteration ``step`` with these draws."""
        self._iterations += 1
        for update in self._method.iteration(step, _prompts(rng.index, self.cfg.method.prompt_group), rng):
            self._log.updates[update.role] += 1
            before = self._log.calls.copy()
            update.loss(update.batch)
            graded = (who for who in MODEL_ROLES if self._log.calls[who, True] > before[who, True])
            self._log.losses.update(graded)

    def counts(self) -> Tally:
        """Means over the iterations."""
        return _means(self._log, self._iterations, self.cfg.loop.batch_size)


@dataclass(frozen=True)
class _EveryStep(SampleRng):
    """Draws whose tau goes through all student steps in turn, so that mean costs are the expected ones."""

    turn: int = 0

    def integer(self, purpose: str, high: int, i: int = 0) -> Tensor:
        """As before, but for tau: sample k takes step (k + turn) mod N."""
        return (self.index + self.turn) % high if purpose == "tau" else super().integer(purpose, high, i)

    def on_host(self) -> SampleRng:
        return self


def tally(cfg: RunConfig, iterations: int = ITERATIONS) -> Tally:
    """The mean cost of an outer iteration of this recipe, in units of its batch.

    From ``iterations`` or a few more of them, spread evenly over the run.
    """
    rounds = -(-iterations // len(cfg.method.student_steps)) * len(cfg.method.student_steps)
    return dry_run(cfg, [int((turn + 0.5) * cfg.loop.steps / rounds) for turn in range(rounds)])


def dry_run(cfg: RunConfig, steps: Sequence[int], first: int = 0) -> Tally:
    """The mean cost of these iterations, whose tau goes through the student's steps in turn from number ``first`` on."""
    run = DryRun(cfg)
    for turn, step in enumerate(steps, first):
        run.iteration(step, _EveryStep(0, step, torch.arange(cfg.loop.batch_size), turn=turn))
    return run.counts()


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
