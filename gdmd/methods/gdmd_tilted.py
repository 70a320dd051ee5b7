"""Tilted GDMD (ours, beyond arXiv 2604.19009): DMD toward the teacher tilted by the rewards of finished rollouts.

    x_tar = x0 - (x0_fake - x0_real - kappa sum_k w_k (y_k - mean y) - v) / n,    w = softmax(gamma R(y) / Z)

y_k: finished samples; the student's own sampler, continued K times from x0 with fresh noise (a deterministic sampler
gets it at the first step only). v: the reward gradient at two of them. n: DMD2's normalizer, or 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import continuation
from gdmd.losses.advantages import RunningScale, softmax_weights
from gdmd.losses.denoising import mean_square
from gdmd.losses.dmd import normalizer
from gdmd.methods.base import Constructed, Distillation, Rollout, StudentBatch
from gdmd.methods.score_stats import target_stats
from gdmd.methods.scorer import Scorer, mean_advantage
from gdmd.types import SINGLE_PROCESS, Loss, PromptBatch, Update

GRADIENT_ROLLOUTS = 2
"""Finished rollouts that get a reward gradient: two halve its variance; each costs one backward pass."""


@dataclass(frozen=True)
class Finished:
    """K finished rollouts of each sample."""

    y: Tensor  # [B, K, C, H, W]
    scores: Tensor  # [R, K, B], raw rewards, NaN = not scored
    gradient: Tensor | None  # [B, C, H, W], v


@dataclass
class GdmdTilted(Distillation[TiltedGDMDConfig]):
    """The extra fake score updates, eta more with a target each, then eta student updates toward the targets' mean."""

    scorer: Scorer = field(kw_only=True)
    scale: RunningScale = field(init=False)  # Z

    def __post_init__(self) -> None:
        if self.cfg.rewarded and self.cfg.reward_gradient > 0:
            self.scorer.require_differentiable("gdmd_tilted with reward_gradient")
        self.scale = RunningScale(len(self.scorer.rewards))

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration; gamma = 0 finishes no rollout and follows each draw's own target, as DMD does."""
        rollout, eta = self.rollout(prompts, rng), self.cfg.group_size
        finished = self.finish(rollout, prompts, rng) if self.cfg.gamma > 0 else None
        for i in range(eta, eta + self.cfg.extra_fake_updates):
            yield Update("fake", self.fake_loss, self.fake_batch(rollout, rng, i))
        targets = []  # eta x [B, C, H, W], or eta x [B, K, C, H, W] with rollouts
        for i in range(eta):
            yield Update("fake", self.fake_loss, self.fake_batch(rollout, rng, i))
            targets.append(self.draw_target(rollout, finished, rng, i))
        if finished is not None:
            weights = self.weigh(finished, rollout, prompts, rng)  # [eta, K, B]
            targets = [weighted_mean(targets, weights)] * eta
            self.constructed = Constructed(rollout, targets[0], prompts)
        for x_tar in targets:
            batch = StudentBatch(rollout.x_tau, rollout.tau, rollout.cond, x_tar)
            yield Update("student", self.weighted_student_loss, batch)

    @torch.no_grad()
    def finish(self, rollout: Rollout, prompts: PromptBatch, rng: SampleRng) -> Finished:
        """Continue the sampler K times from x0, score the finished samples and take v, their reward gradient."""
        ys, scores, gradients = [], [], []
        for k in range(self.cfg.continuations):
            again = lambda i, k=k: rng.normal(f"continuation/{k}", self.latent_shape, i)  # noqa: E731
            student, steps, schedule = self.roles.student, self.cfg.student_steps, self.roles.schedule
            y = continuation(
                *(student, rollout.x0, rollout.stop, steps, rollout.cond, again, schedule),
                together=prompts.ranks is not SINGLE_PROCESS,
                sampler=self.cfg.student_sampler,
            )
            if self.cfg.reward_gradient > 0 and k < GRADIENT_ROLLOUTS:
                _, gradient, score = self.scorer.gradient(y, prompts, self.normalized_reward)
                gradients.append(gradient)
            else:
                score = self.scorer(y, prompts)
            ys.append(y)
            scores.append(score)
        self._stats["latent/scored_std"] = ys[-1].std()
        v = None
        if gradients:  # L_DMD is a mean square of N numbers: its gradient is 2 / N of the distance to the target
            v = 0.5 * self.cfg.reward_gradient * rollout.x0[0].numel() * torch.stack(gradients).mean(0)
            self._stats["gap/pull"] = mean_square(v).sqrt().mean()
        return Finished(torch.stack(ys, 1), torch.stack(scores, 1), v)

    def normalized_reward(self, scores: Tensor) -> Tensor:
        """mean_k R_k / Z_k, Z of the previous steps; 0 for an unscored sample and in the first step. [R, B] -> [B]"""
        z = to_device_async(self.scale.value(), scores.device)
        reward = mean_advantage(scores, torch.zeros_like(scores), z)
        return torch.where(reward.isnan(), 0.0, reward)

    @torch.no_grad()
    def draw_target(self, rollout: Rollout, finished: Finished | None, rng: SampleRng, i: int) -> Tensor:
        """x0 - (x0_fake - x0_real - kappa (y_k - mean y) - v) / n at draw i of (t, eps); DMD's without rollouts."""
        scores = self.scores(rollout, rng, i)
        x_tar = self.target(rollout, scores)
        if finished is None:
            return x_tar
        tilt = self.cfg.continuation_weight * (finished.y - finished.y.mean(1, keepdim=True))
        tilt = tilt if finished.gradient is None else tilt + finished.gradient[:, None]
        n = normalizer(rollout.x0, scores.x0_real)[:, None] if self.cfg.normalize else 1
        return x_tar[:, None] + tilt / n

    @torch.no_grad()
    def weigh(self, finished: Finished, rollout: Rollout, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """Softmax weights of all eta K targets, mean 1, with Z of the global batch. [eta, K, b]"""
        scores = prompts.ranks.all_gather(finished.scores, 2)  # [R, K, B]
        z = self.scale.update(scores)  # every score counts once
        advantage = mean_advantage(scores, scores.nanmean(1), z)  # [K, B]; a softmax does not see what is subtracted
        self._stats |= target_stats(self.scorer.rewards, scores, advantage.isnan())
        return prompts.ranks.local_shard(self.softmax(advantage.expand(self.cfg.group_size, -1, -1)), 2)

    def softmax(self, advantage: Tensor) -> Tensor:
        """Weights over eta K targets of each sample, mean 1; 1 for an unscored one. [eta, K, B] -> [eta, K, B]"""
        flat = softmax_weights(advantage.flatten(0, 1), self.cfg.gamma)
        self._stats["weight/mean"] = self.cfg.dmd_weight * flat.mean()
        self._stats["weight/effective"] = (flat.sum(0).square() / flat.square().sum(0)).mean()  # of eta K targets
        return flat.reshape(advantage.shape)

    def weighted_student_loss(self, batch: StudentBatch) -> Loss:
        """dmd_weight || x0 - x_tar ||^2 with x0 by the current student."""
        loss = self.cfg.dmd_weight * self.student_loss(batch).per_sample
        return Loss(loss, {"loss/student": loss.detach()})

    def state(self) -> Mapping[str, Tensor]:
        """Z."""
        return self.scale.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.scale.load(state)


def weighted_mean(targets: list[Tensor], weights: Tensor) -> Tensor:
    """sum_ik w_ik targets_ik / sum_ik w_ik. eta x [B, K, C, H, W], [eta, K, B] -> [B, C, H, W]"""
    share = (weights / weights.sum((0, 1))).transpose(1, 2)[..., None, None, None]  # [eta, B, K, 1, 1, 1]
    return torch.stack([(own * x_tar).sum(1) for own, x_tar in zip(share, targets, strict=True)]).sum(0)
