"""GDMD (arXiv 2604.19009): DaGC collects DMD gradients, IGS scores their implicit targets, NaPO weighs the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gdmd.config.methods.gdmd import GdmdConfig
from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import continuation
from gdmd.losses.advantages import RunningBaseline, RunningScale, softmax_weights
from gdmd.losses.denoising import mean_square
from gdmd.losses.dmd import dmd_gradient, dmd_loss, normalizer
from gdmd.losses.gdmd import implicit_target, napo_loss, optimality, step_weight
from gdmd.methods.base import Distillation, Rollout
from gdmd.methods.scorer import Scorer, mean_advantage
from gdmd.types import ALONE, Cond, Loss, PromptBatch, Update

MEAN_DECAY = 0.99
"""EMA of mean r for the constant control: the horizon of Z."""
STEERED = 2
"""Ends whose reward is differentiated, with reward_gradient: two halve its noise, more cost a backward pass each."""


@dataclass
class Group:
    """What DaGC has collected: E draws x G targets (guidance scales, or continuations) per sample."""

    x_tar: list[Tensor] = field(default_factory=list)  # E x [B, G, C, H, W], regressed to
    score: list[Tensor] = field(default_factory=list)  # E x [R, G, B], raw rewards of the scored targets; one for all
    # draws where they share what is scored
    t: list[Tensor] = field(default_factory=list)  # E x [B]
    ends: Tensor | None = None  # [B, K, C, H, W], finished pictures of the continuations
    pull: Tensor | None = None  # [B, C, H, W], the rewards' own gradient at two of them, as a move of the target

    def average(self, share: Tensor) -> None:
        """Put the weighted mean of all E G targets in the place of each draw's. share [E, G, B], mean 1."""
        part = (share / share.sum((0, 1))).transpose(1, 2)[..., None, None, None]  # [E, B, G, 1, 1, 1]
        mean = torch.stack([(own * targets).sum(1) for own, targets in zip(part, self.x_tar, strict=True)]).sum(0)
        self.x_tar = [mean[:, None]] * len(self.x_tar)


@dataclass(frozen=True)
class StudentBatch:
    x_tau: Tensor
    tau: Tensor
    cond: Cond
    x0_old: Tensor  # [B, C, H, W]
    x_tar: Tensor  # [B, G, C, H, W]
    r: Tensor  # [B, G], NaN = not scored
    share: Tensor  # [B, G], softmax weights (1 with NaPO)


class Gdmd(Distillation[GdmdConfig]):
    """Algorithm 1 with the modes t, fake and all; gamma = 0 makes no score and is plain DMD."""

    def attach(self, scorer: Scorer) -> Gdmd:
        """Give the method its rewards, differentiable ones for reward_gradient (ValueError); returns itself."""
        if self.cfg.continued and self.cfg.reward_gradient > 0:
            scorer.require_differentiable("gdmd with reward_gradient")
        self.scorer = scorer
        self.scale = RunningScale(len(scorer.rewards), self.cfg.z_decay)
        self.baseline = RunningBaseline(self.cfg.targets)
        self.mean_r = torch.full((2,), 0.0, dtype=torch.float64)  # EMA of mean r, and the mass it has seen
        self.student_updates = 0
        return self

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration of Algorithm 1: eta fake updates and gradients, then eta student updates."""
        r = self.rollout(prompts, rng)
        x0_old = self._old_prediction(r)
        group = self._continue(r, prompts, rng) if self.cfg.continued else Group()
        for i in range(self.cfg.group_size):
            yield Update("fake", self.fake_loss, self.fake_batch(r, rng, i))
            if self.cfg.collection != "t":
                self._collect(group, r, prompts, rng, i if self.cfg.collection == "all" else 0)
        if self.cfg.collection == "t":
            for i in range(self.cfg.group_size):
                self._collect(group, r, prompts, rng, i)
        optimal, share = self._weigh(group, r, prompts, rng)  # each [E, G, B]
        if self.cfg.student_target == "mean":
            group.average(share)
            share = torch.ones_like(share[:, :1])
        for i in range(self.cfg.group_size):
            x_tar, own, part = group.x_tar[i], optimal[i].T, share[i].T
            yield Update("student", self.student_loss, StudentBatch(r.x_tau, r.tau, r.cond, x0_old, x_tar, own, part))
            self._follow()

    @torch.no_grad()
    def _old_prediction(self, r: Rollout) -> Tensor:
        if self.cfg.old_policy == "snapshot":
            return r.x0
        if self.student_updates == 0:
            self.roles.follow(0.0)  # the old policy begins as the student, wherever that begins
        return self.roles.old(r.x_tau, r.tau, r.cond).x0

    def _follow(self) -> None:
        self.student_updates += 1
        if self.cfg.old_policy == "ema":
            self.roles.follow(min(1e-3 * self.student_updates, self.cfg.old_decay))

    @torch.no_grad()
    def _continue(self, r: Rollout, prompts: PromptBatch, rng: SampleRng) -> Group:
        """K ends y_k of each sample's roll-out, their raw rewards, and the gradient of these if it is asked for."""
        ends, scores, slopes = [], [], []
        for k in range(self.cfg.continuations):
            again = lambda i, k=k: rng.normal(f"continuation/{k}", self.latent_shape, i)  # noqa: E731
            steps, alone = self.cfg.student_steps, prompts.ranks is ALONE
            own = self.roles.schedule
            ends.append(continuation(self.roles.student, r.x0, r.stop, steps, r.cond, again, own, together=not alone))
            if self.cfg.reward_gradient > 0 and k < STEERED:
                _, slope, score = self.scorer.slope(ends[-1], prompts, self._merit)
                slopes.append(slope)
                scores.append(score)
            else:
                scores.append(self.scorer(ends[-1], prompts))
        self._stats["latent/scored_std"] = ends[-1].std()
        group = Group(ends=torch.stack(ends, 1), score=[torch.stack(scores, 1)])
        if slopes:  # L_DMD is a mean square of N numbers: its gradient is 2 / N of the distance to the target
            group.pull = 0.5 * self.cfg.reward_gradient * r.x0[0].numel() * torch.stack(slopes).mean(0)
            if self.cfg.exchanged:
                group.pull = self._pass_on(group.pull, prompts, rng)
            self._stats["gap/pull"] = mean_square(group.pull).sqrt().mean()
        return group

    def _pass_on(self, own: Tensor, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """Each sample's part of ``own`` [b, ...] given to the next of the global batch in a random circle: none keeps it."""
        whole, index = prompts.ranks.gather(own), prompts.ranks.gather(rng.index)
        order = replace(rng, index=index, host=None).uniform("shuffle/gradient").argsort()
        mixed = torch.empty_like(whole)
        mixed[order.roll(1)] = whole[order]
        return prompts.ranks.share(mixed)

    def _merit(self, scores: Tensor) -> Tensor:
        """mean_k R_k / Z_k by the Z of the steps before; 0 for an unscored sample and in the first step. [R, B] -> [B]"""
        z = to_device_async(self.scale.value(), scores.device)
        merit = mean_advantage(scores, torch.zeros_like(scores), z)
        return torch.where(merit.isnan(), 0.0, merit)

    @torch.no_grad()
    def _collect(self, group: Group, r: Rollout, prompts: PromptBatch, rng: SampleRng, i: int) -> None:
        """DaGC: the targets of draw i, and the raw rewards of what is scored in their place."""
        guidances = self.cfg.guidances
        scores = self.scores(r, rng, i, both=any(g != 1 for g in guidances))
        group.t.append(scores.t)
        if group.ends is not None:
            g = self.cfg.guidance
            tilt = self.cfg.continuation_weight * (group.ends - group.ends.mean(1, keepdim=True))
            tilt = tilt if group.pull is None else tilt + group.pull[:, None]
            n = normalizer(r.x0, scores.teacher.at(g))[:, None] if self.cfg.normalize else 1
            group.x_tar.append(self.target(r, scores, g)[:, None] + tilt / n)
            return
        group.x_tar.append(torch.stack([self.target(r, scores, g) for g in guidances], 1))
        if self.cfg.gamma == 0 or (group.score and self.cfg.shares_scores):
            return
        scored = []
        for place, g in enumerate(guidances):
            match self.cfg.score_target:
                case "raw":
                    raw = dmd_gradient(r.x0, scores.teacher.at(g), scores.x0_fake, normalize=False)
                    shown = implicit_target(r.x0, raw)
                case "normalized":
                    shown = group.x_tar[-1][:, place]
                case "real":
                    shown = scores.teacher.at(g)
                case "continuation":
                    raise AssertionError("continuations are scored before the gradients are collected")
            self._stats["latent/scored_std"] = shown.std()
            scored.append(self.scorer(shown, prompts))
        group.score.append(torch.stack(scored, 1))

    @torch.no_grad()
    def _weigh(self, group: Group, r: Rollout, prompts: PromptBatch, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """IGS: (r, softmax share) of this rank's samples, each [E, G, b], by statistics of the global batch."""
        if self.cfg.gamma == 0:
            ones = torch.ones(len(group.x_tar), group.x_tar[0].shape[1], len(prompts), device=r.x0.device)
            return 0.5 * ones, ones
        ranks = prompts.ranks
        timed = self.cfg.score_baseline == "time"
        t = ranks.gather(torch.stack(group.t), 1) if timed else None  # [E, B]
        reward_target = ranks.gather(
            torch.stack(group.score, 1), 3
        )  # [R, E, G, B], or [R, 1, G, B] shared by the draws
        reward_sample = ranks.gather(self.scorer(r.x0, prompts), 1) if self.cfg.compares_sample else None  # [R, B]
        everyone = replace(rng, index=ranks.gather(rng.index), host=None)
        optimal, share = self._weigh_all(reward_target, reward_sample, t, everyone, len(group.x_tar))
        return ranks.share(optimal, 2), ranks.share(share, 2)

    def _weigh_all(
        self, reward_target: Tensor, reward_sample: Tensor | None, t: Tensor | None, rng: SampleRng, draws: int
    ) -> tuple[Tensor, Tensor]:
        """(r, softmax share), each [E, G, B], of the global batch, whose draws ``rng`` makes; E = ``draws``.

        reward_sample None: scores are measured from the mean of their sample's targets, which no softmax sees.
        """
        origin = reward_target.nanmean((1, 2)) if reward_sample is None else reward_sample  # [R, B]
        gain = reward_target - origin[:, None, None]
        z = self.scale.update(reward_target if self.cfg.z_source == "reward" else gain)  # every score counts once
        advantage = mean_advantage(reward_target, origin, z).expand(draws, -1, -1)  # [E, G, B]
        ones = torch.ones_like(advantage)
        if t is not None:
            advantage = advantage - self.baseline.update(advantage, t)
        optimal = optimality(advantage, torch.zeros_like(advantage), 1.0)
        self._count(optimal, reward_target, reward_sample)
        if self.cfg.control == "shuffled":
            advantage, optimal = self._shuffle(advantage, rng), self._shuffle(optimal, rng)
        if self.cfg.control == "constant":
            optimal = torch.where(optimal.isnan(), optimal, self._running_mean(optimal))
        if self.cfg.weighting == "napo":
            return optimal, ones
        flat = softmax_weights(advantage.flatten(0, 1), self.cfg.gamma)
        self._stats["weight/mean"] = self.cfg.dmd_weight * flat.mean()
        self._stats["weight/effective"] = (flat.sum(0).square() / flat.square().sum(0)).mean()  # of E G targets
        return optimal, flat.reshape(ones.shape)

    def _count(self, optimal: Tensor, reward_target: Tensor, reward_sample: Tensor | None) -> None:
        """Statistics of the scores; unscored targets are left out of all but their own count."""
        scored = ~optimal.isnan()
        self._stats |= {"reward/target": reward_target.nanmean(), "reward/unscored": (~scored).float().mean()}
        for k, reward in enumerate(self.scorer.rewards):
            self._stats[f"reward/{reward.name}/target"] = reward_target[k].nanmean()
        if reward_sample is None:
            return
        weight = step_weight(optimal, self.cfg.dmd_weight, self.cfg.gamma, self.cfg.beta)
        self._stats |= {
            "reward/sample": reward_sample.nanmean(),
            "reward/gain": (reward_target - reward_sample[:, None, None]).nanmean(),
            "weight/mean": weight.nanmean(),
            "weight/r_mean": optimal.nanmean(),
            "weight/r_std": torch.where(scored, optimal, optimal.nanmean()).std(),
            "weight/share_below_half": ((optimal < 0.5) & scored).float().sum() / scored.float().sum(),
            "weight/share_clipped": ((optimal <= 0) | (optimal >= 1)).float().mean(),
        }
        for k, reward in enumerate(self.scorer.rewards):
            self._stats[f"reward/{reward.name}/sample"] = reward_sample[k].nanmean()
        for k in range(10):
            inside = (optimal >= k / 10) & ((optimal < (k + 1) / 10) | (k == 9))
            self._stats[f"histogram/r_{k}"] = inside.float().mean()

    def _shuffle(self, values: Tensor, rng: SampleRng) -> Tensor:
        """One permutation of all E G B places, the same for every call of a step."""
        keys = rng.uniform("shuffle", count=max(2, values[..., 0].numel()))[:, : values[..., 0].numel()]
        return values.flatten()[keys.T.flatten().argsort()].reshape(values.shape)

    def _running_mean(self, optimal: Tensor) -> Tensor:
        """EMA of mean r, 0-d; a step in which nothing was scored changes nothing."""
        mean, before = optimal.nanmean().double(), to_device_async(self.mean_r, optimal.device)
        fresh = torch.stack([mean, torch.ones_like(mean)])
        self.mean_r = torch.where(mean.isnan(), before, MEAN_DECAY * before + (1 - MEAN_DECAY) * fresh)
        return (self.mean_r[0] / self.mean_r[1]).to(optimal.dtype)

    def student_loss(self, batch: StudentBatch) -> Loss:
        """L = lambda L_DMD + gamma L_RL, mean over the G targets of a draw; x0 by the current student."""
        x0 = self.roles.student(batch.x_tau, batch.tau, batch.cond).x0
        part = self._napo if self.cfg.weighting == "napo" else self._softmax
        losses = [part(x0, batch, g) for g in range(batch.x_tar.shape[1])]
        loss = torch.stack(losses).mean(0)
        return Loss(loss, {"loss/student": loss.detach()})

    def _napo(self, x0: Tensor, batch: StudentBatch, g: int) -> Tensor:
        x_tar, r = batch.x_tar[:, g], batch.r[:, g]
        distill = dmd_loss(x0, x_tar)
        if self.cfg.control == "indicator":
            return torch.where(r.isnan(), 1.0, (r > 0.5).float()) * distill
        if self.cfg.gamma == 0:
            return self.cfg.dmd_weight * distill
        scored = ~r.isnan()
        steer = napo_loss(x0, batch.x0_old, x_tar, torch.where(scored, r, 0.5), self.cfg.beta)
        return self.cfg.dmd_weight * distill + self.cfg.gamma * torch.where(scored, steer, 0.0)

    def _softmax(self, x0: Tensor, batch: StudentBatch, g: int) -> Tensor:
        return self.cfg.dmd_weight * batch.share[:, g] * dmd_loss(x0, batch.x_tar[:, g])

    def state(self) -> Mapping[str, Tensor]:
        """Z, the baseline, the running mean of r, and the count of student updates (the old policy's clock)."""
        counted = torch.tensor([self.student_updates], dtype=torch.int64)
        scale = {f"scale.{k}": v for k, v in self.scale.state().items()}
        scale |= {f"baseline.{k}": v for k, v in self.baseline.state().items()}
        return {**scale, "mean_r": self.mean_r, "student_updates": counted}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.scale.load({k.removeprefix("scale."): v for k, v in state.items() if k.startswith("scale.")})
        self.baseline.load({k.removeprefix("baseline."): v for k, v in state.items() if k.startswith("baseline.")})
        self.mean_r = state["mean_r"].clone()
        self.student_updates = int(state["student_updates"])
