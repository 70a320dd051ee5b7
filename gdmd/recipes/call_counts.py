"""A method's network calls, counted by running the method itself on networks of one weight.

So the count holds for all options; nothing is loaded and nothing large is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.methods.dmd2 import DMD2Config
from gdmd.config.run import RunConfig
from gdmd.diffusion.guidance import plain
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import FlowSchedule
from gdmd.methods.pass_counter import BACKWARD, FROZEN_BACKWARD
from gdmd.recipes.build import LatentSpec, method_of
from gdmd.types import Cond, Prediction, PromptBatch, Role

ITERATIONS = 16
"""Iterations that are counted, spread evenly over the run because methods with stages change during it."""
LATENT = (1, 2, 2)
MODEL_ROLES = ("student", "fake", "teacher", "old")


@dataclass(frozen=True)
class CallCounts:
    """Means per outer iteration. Passes, and what is decoded, are samples per sample of the batch."""

    updates: Mapping[Role, float]
    passes: Mapping[str, float]  # without gradient, by role
    with_grad: Mapping[str, float]  # passes with a backward pass, by role
    decoded: float  # latents decoded and scored
    decoded_with_grad: float  # the same for a backward pass through rewards and decoder
    decoder_backwards: float  # backward passes through the decoder: several for a decoding if each reward has its own
    scorings: float  # calls of the rewards on the whole batch
    scorings_with_grad: float  # on a micro-batch
    scored_in_updates: bool  # whether these are inside a loss, whose graph waits meanwhile
    calls: Mapping[str, float]  # network calls without gradient, by role
    calls_with_grad: Mapping[str, float]
    losses: Mapping[str, float]  # losses that have calls with gradient, by role
    feature_passes: float  # of the fake score with gradient, from whose features a GAN head reads
    prompt_batches: float  # batches of prompts drawn and encoded
    max_batch: float  # samples of the largest call without gradient, in batches (2: guidance in one call)
    old_policy: bool


@dataclass
class _Log:
    samples: Counter[tuple[str, bool]] = field(default_factory=Counter)
    calls: Counter[tuple[str, bool]] = field(default_factory=Counter)
    updates: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    scorings: Counter[bool] = field(default_factory=Counter)  # with gradient?
    decoder_backwards: int = 0
    prompts: int = 0
    max_batch: int = 0
    scored_in_updates: bool = False

    def note(self, who: str, answer: Tensor) -> None:
        """A call of ``who`` that gave this answer, [B, ...]."""
        self.samples[who, answer.requires_grad] += len(answer)
        self.calls[who, answer.requires_grad] += 1
        if who in MODEL_ROLES and not answer.requires_grad:
            self.max_batch = max(self.max_batch, len(answer))

    def note_decoding(self, latents: Tensor) -> None:
        """A decoding of these latents, [B, ...], for the rewards."""
        self.note("decoder", latents)
        self.scorings[latents.requires_grad] += 1

    def note_backward(self, gradient: Tensor) -> None:
        """A backward pass that reached decoded images with this gradient, [B, ...]."""
        self.decoder_backwards += len(gradient)


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
    """Every role as a network of one weight."""

    def __init__(self, log: _Log, *, gan: bool) -> None:
        self.schedule, self.guide = FlowSchedule(), plain
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
        """Nothing to do: a method that has an old policy calls it."""

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
        self.log.note_decoding(latents)
        if not latents.requires_grad:
            return latents
        images = latents.clone()
        images.register_hook(self.log.note_backward)  # type: ignore[no-untyped-call]
        return images

    def encode(self, images: Tensor) -> Tensor:
        return images

    def score(self, images: Tensor, prompts: PromptBatch) -> Tensor:
        """Different for different images, as an advantage needs."""
        return images.mean((1, 2, 3))


@dataclass(frozen=True)
class _EveryStep(SampleRng):
    """Draws whose tau goes through all student steps in turn, so that mean costs are the expected ones."""

    turn: int = 0

    def integer(self, purpose: str, high: int, i: int = 0) -> Tensor:
        """As in ``SampleRng``, except for tau: sample k takes step (k + turn) mod N."""
        return (self.index + self.turn) % high if purpose == "tau" else super().integer(purpose, high, i)

    def on_host(self) -> SampleRng:
        return self


def count_calls(cfg: RunConfig, iterations: int = ITERATIONS) -> CallCounts:
    """The mean cost of an outer iteration of this recipe, in units of its batch.

    From ``iterations`` or a few more of them, spread evenly over the run. The last one is that of the run: a short last
    stage needs its memory, too.
    """
    rounds = -(-iterations // len(cfg.method.student_steps)) * len(cfg.method.student_steps)
    spread = [*(int((turn + 0.5) * cfg.loop.steps / rounds) for turn in range(rounds - 1)), cfg.loop.steps - 1]
    method, length = cfg.method, cfg.loop.steps
    if not (isinstance(method, DMDConfig) and method.regression_weight > 0 and method.regression_batches):
        return dry_run(cfg, spread)
    # the first iterations solve the pairs that all others use
    always = cfg.model_copy(update={"method": method.model_copy(update={"regression_batches": 0})})
    solving, settled = dry_run(always, spread), dry_run(cfg, spread, before=range(method.regression_batches))
    share = min(method.regression_batches, length) / length
    passes = {who: share * solving.passes[who] + (1 - share) * settled.passes[who] for who in MODEL_ROLES}
    calls = {who: share * solving.calls[who] + (1 - share) * settled.calls[who] for who in MODEL_ROLES}
    return replace(settled, passes=passes, calls=calls, max_batch=max(solving.max_batch, settled.max_batch))


def dry_run(cfg: RunConfig, steps: Sequence[int], first: int = 0, before: Sequence[int] = ()) -> CallCounts:
    """The mean cost of these iterations, whose tau goes through the student's steps in turn from number ``first`` on.

    ``before``: iterations that are made first and do not count.
    """
    log = _Log()
    roles = _Roles(log, gan=isinstance(cfg.method, DMD2Config) and cfg.method.adversarial)
    images, rewards = _Images(log), tuple(_Images(log) for _ in cfg.rewards) if cfg.method.rewarded else ()
    real = lambda prompts, rng: rng.normal("real", LATENT)  # noqa: E731
    method = method_of(cfg.method, roles, images, rewards, LatentSpec(LATENT), real)
    index = torch.arange(cfg.loop.batch_size)
    for turn, step in enumerate([*before, *steps], first - len(before)):
        if turn == first:
            vars(log).update(vars(_Log()))
        rng = _EveryStep(0, step, index, turn=turn)
        for update in method.iteration(step, _prompts(index, cfg.method.prompt_group, log), rng):
            log.updates[update.role] += 1
            calls, scorings = log.calls.copy(), log.scorings[True]
            update.loss(update.batch)
            log.losses.update(who for who in MODEL_ROLES if log.calls[who, True] > calls[who, True])
            log.scored_in_updates |= log.scorings[True] > scorings
    return _means(log, len(steps), cfg.loop.batch_size)


def _prompts(index: Tensor, group: int, log: _Log) -> PromptBatch:
    log.prompts += 1
    cond = {"text": torch.zeros(len(index), 1)}
    others = lambda i: _prompts(index, group, log)  # noqa: E731
    return PromptBatch(index, ("",) * len(index), index // group, cond, cond, others=others)


def _means(log: _Log, iterations: int, batch: int) -> CallCounts:
    def share(who: str, with_grad: bool) -> float:
        return log.samples[who, with_grad] / iterations / batch

    return CallCounts(
        updates={"student": log.updates["student"] / iterations, "fake": log.updates["fake"] / iterations},
        passes={who: share(who, False) for who in MODEL_ROLES},
        with_grad={who: share(who, True) for who in MODEL_ROLES},
        decoded=share("decoder", False),
        decoded_with_grad=share("decoder", True),
        decoder_backwards=log.decoder_backwards / iterations / batch,
        scorings=log.scorings[False] / iterations,
        scorings_with_grad=log.scorings[True] / iterations,
        scored_in_updates=log.scored_in_updates,
        calls={who: log.calls[who, False] / iterations for who in MODEL_ROLES},
        calls_with_grad={who: log.calls[who, True] / iterations for who in MODEL_ROLES},
        losses={who: log.losses[who] / iterations for who in MODEL_ROLES},
        feature_passes=share("critic", True),
        prompt_batches=log.prompts / iterations,
        max_batch=log.max_batch / batch,
        old_policy=log.calls["old", False] > 0,
    )


def forward_passes(counts: CallCounts, full: str = "both", feature_cost: float = 1.0) -> float:
    """Forward passes per student update and sample of the batch: a backward counts 2, or 1 through a frozen backbone.

    full: which roles train all weights (model.full); feature_cost: forward passes of a call for features.
    """
    backward = {who: BACKWARD if full in (who, "both") else FROZEN_BACKWARD for who in ("student", "fake")}
    total = sum(counts.passes.values())
    total += sum(share * (1 + backward.get(who, FROZEN_BACKWARD)) for who, share in counts.with_grad.items())
    total -= counts.feature_passes * (1 + backward["fake"]) * (1 - feature_cost)
    return total / counts.updates["student"]
