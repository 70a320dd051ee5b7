"""DMDR (arXiv 2511.13649v4): reward-tilted DMD with two annealed schedules, then DMD and a reward loss together.

Stage 1, ``cold_start`` iterations: RT-DM weights the DMD gradient of a sample by exp(r / ||r||), r the reward of its
finished few-step image (``losses.reward_tilt`` says how it is normalized); DynaDG moves the real score by a share of
the fake score's displacement, so that the two distributions overlap at the start; DynaRS re-noises to high noise first.
One cosine anneals both to DMD.
Stage 2: L_DMD + lambda_rl L_rl, L_rl by ReFL, GRPO or DPO. 5 fake-score updates per student update throughout.
In the authors' code the student is not trained at the states x_tau of its rollout: the x0 that the rollout predicts at
tau is re-noised to tau, x_tau' = alpha x0 + sigma n, and the student predicts from there; the fake score learns from
that x0.

DynaDG with full copies: the paper has one frozen base model whose LoRA, at scale 2, is the fake score; the real score
is that base model with the same LoRA at scale 0.5 c. For copies that is the interpolation of *weights*,
teacher + (0.5 / 2) c (fake - teacher), in both of the guidance passes. Interpolating predictions would only be a
first-order approximation, and would leave out the unconditional pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.diffusion.dmdr_schedules import annealed_shape, beta_quantile, cosine_anneal
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.sampling import few_step_sample
from gdmd.diffusion.schedule import renoise
from gdmd.losses.advantages import group_advantage
from gdmd.losses.dmd import dmd_loss
from gdmd.losses.grpo import grpo_loss
from gdmd.losses.refl import mean_refl_loss
from gdmd.losses.reward_tilt import reward_tilt
from gdmd.methods.base import Rollout, StudentBatch
from gdmd.methods.baseline import Baseline
from gdmd.methods.dmd_refl import RewardedBatch
from gdmd.methods.preference_pairs import PreferencePairs, preference_loss, preference_pairs
from gdmd.methods.rollouts import PolicyBatch, collect, collection_stats, policy_batch, step_log_prob
from gdmd.methods.score_stats import sample_stats
from gdmd.methods.scorer import Scorer
from gdmd.types import Denoiser, Loss, PromptBatch, Update

Blend = Callable[[float], Denoiser]
"""share -> the real score with that share of the fake score's displacement."""


@dataclass(frozen=True)
class TiltedBatch(StudentBatch):
    """The student's batch with a weight for each sample's DMD gradient."""

    weight: Tensor  # [B], of the DMD gradient


@dataclass(frozen=True)
class PreferredBatch(StudentBatch):
    """The student's batch with preference pairs."""

    pairs: PreferencePairs


@dataclass
class Dmdr(Baseline[DMDRConfig]):
    """DMD's iteration with the schedules of its step, and the student loss of its stage.

    ValueError for strategy refl with rewards that are not differentiable.
    """

    scorer: Scorer = field(kw_only=True)
    blend: Blend = field(kw_only=True)
    pace: float = field(default=0.0, init=False)  # c of the schedules

    def __post_init__(self) -> None:
        if self.cfg.strategy == "refl" and self.cfg.rl_weight > 0:
            self.scorer.require_differentiable("dmdr with strategy refl")

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration; ``step`` is also the number of student updates made."""
        self.pace = cosine_anneal(step, self.cfg.anneal)
        r = self.rollout(prompts, rng)
        trained = self.renoised(r, rng) if self.cfg.trains_renoised else r
        (batch,) = yield from self.fake_updates(r, prompts, rng, trained=trained)
        self._stats["schedule/c"] = torch.tensor(self.pace)
        if step < self.cfg.cold_start:
            yield self._tilted(batch, prompts, rng)
        elif self.cfg.rl_weight > 0:
            yield self._rewarded(step, batch, prompts, rng)
        else:
            yield Update("student", self.student_loss, batch)

    @torch.no_grad()
    def renoised(self, r: Rollout, rng: SampleRng) -> Rollout:
        """The rollout with its x0 re-noised to tau by fresh noise as x_tau, and with the student's x0 from there."""
        x_tau = renoise(r.x0, r.tau, rng.normal("own_x0", self.latent_shape), self.roles.schedule)
        return replace(r, x_tau=x_tau, x0=self.roles.student(x_tau, r.tau, r.cond).x0)

    def real_score(self) -> Denoiser:
        """DynaDG: the teacher moved by overlap c toward the fake score; the teacher itself when that is 0."""
        share = self.cfg.overlap * self.pace
        return self.blend(share) if share > 0 else self.roles.teacher

    def renoise_time(self, rng: SampleRng, i: int) -> Tensor:
        """DynaRS inside DMD's interval: low + (high - low) Beta; uniform again at c = 0."""
        if self.pace == 0:
            return super().renoise_time(rng, i)
        low, high = self.cfg.renoise_low, self.cfg.renoise_high
        return low + (high - low) * self._beta(rng.uniform("renoise_t", i))

    def fake_time(self, rng: SampleRng, i: int) -> Tensor:
        """DynaRS also draws the fake score's own times (in the authors' code)."""
        return self._beta(super().fake_time(rng, i))

    def _beta(self, uniform: Tensor) -> Tensor:
        return beta_quantile(uniform, *annealed_shape(self.cfg.beta_a, self.cfg.beta_b, self.pace))

    def _tilted(self, batch: StudentBatch, prompts: PromptBatch, rng: SampleRng) -> Update:
        """RT-DM: each sample's DMD gradient, weighted by the reward of the finished image of its rollout."""
        if self.cfg.tilt == 0:
            return Update("student", self.student_loss, batch)
        reward = self.scorer(self._complete(prompts, rng), prompts)
        everyone = prompts.ranks.all_gather(reward, 1)
        weight = prompts.ranks.local_shard(reward_tilt(everyone, self.cfg.tilt, self.cfg.tilt_unit))
        self._stats |= {"weight/tilt": weight, "reward/complete": reward.mean(0)}
        return Update("student", self.tilted_loss, TiltedBatch(**vars(batch), weight=weight))

    @torch.no_grad()
    def _complete(self, prompts: PromptBatch, rng: SampleRng) -> Tensor:
        """The finished few-step sample from the noise and re-noisings of the step's own rollout. [B, C, H, W]"""
        noise = rng.normal("noise", self.latent_shape)
        again = lambda i: rng.normal("rollout", self.latent_shape, i)  # noqa: E731
        steps, schedule = self.cfg.student_steps, self.roles.schedule
        sampler = self.cfg.student_sampler
        return few_step_sample(self.roles.student, noise, steps, prompts.cond, again, schedule, sampler)

    def _rewarded(self, step: int, batch: StudentBatch, prompts: PromptBatch, rng: SampleRng) -> Update:
        """Stage 2 by the chosen strategy."""
        match self.cfg.strategy:
            case "refl":
                return Update("student", self.refl_student_loss, RewardedBatch(**vars(batch), prompts=prompts))
            case "grpo":
                policy = (self.roles.student, self.roles.schedule)
                collected = collect(*policy, self.scorer, self.cfg, prompts, rng, self.latent_shape)
                self._stats |= collection_stats(collected, self.scorer.rewards)
                return Update("student", self.grpo_student_loss, policy_batch(batch, collected))
            case "dpo":
                if step == self.cfg.cold_start:
                    self.roles.follow(0.0)  # the reference of DPO is the student with which stage 2 begins
                x0 = self._complete(prompts, rng)
                rewards = self.scorer(x0, prompts)
                whole = prompts.ranks.all_gather
                advantage = group_advantage(whole(rewards, 1).sum(0), whole(prompts.group))
                pairs = preference_pairs(x0, advantage, prompts, rng, self.cfg.student_steps, self.roles)
                self._stats |= {"reward/complete": rewards.mean(0), "reward/paired": pairs.known.float()}
                return Update("student", self.dpo_student_loss, PreferredBatch(**vars(batch), pairs=pairs))

    def tilted_loss(self, batch: TiltedBatch) -> Loss:
        """weight L_DMD, the weight of RT-DM."""
        loss = batch.weight * self.student_loss(batch).per_sample
        return Loss(loss, {"loss/student": loss.detach()})

    def refl_student_loss(self, batch: RewardedBatch) -> Loss:
        """L_DMD + lambda_rl mean_k relu(m - R_k(D(x0))): through reward and decoder into the one student step."""
        x0 = self.roles.student(batch.x_tau, batch.tau, batch.cond).x0
        refl, scores = self.scorer.with_gradient(x0, batch.prompts, partial(mean_refl_loss, margin=self.cfg.margin))
        loss = self._joined(dmd_loss(x0, batch.x_tar), refl)
        return replace(loss, stats={**loss.stats, **sample_stats(self.scorer.rewards, scores.detach())})

    def grpo_student_loss(self, batch: PolicyBatch) -> Loss:
        """L_DMD + lambda_rl L_GRPO, mean over the moves of a stochastic rollout; an unscored sample has L_DMD only."""
        log_prob = step_log_prob(self.roles, batch.x, batch.cond, self.cfg)  # [B, N - 1]
        advantage = batch.advantage[:, None]
        scored = ~advantage.isnan()
        grpo = grpo_loss(log_prob, batch.log_prob_old, torch.where(scored, advantage, 0), self.cfg.ratio_clip)
        return self._joined(self.student_loss(batch).per_sample, torch.where(scored, grpo, 0).mean(1))

    def dpo_student_loss(self, batch: PreferredBatch) -> Loss:
        """L_DMD + lambda_rl L_DPO on the best and the worst image of each prompt's group."""
        dpo = preference_loss(self.roles.student, batch.pairs, batch.cond, self.cfg.dpo_beta)
        return self._joined(self.student_loss(batch).per_sample, dpo)

    def _joined(self, distill: Tensor, rl: Tensor) -> Loss:
        loss = distill + self.cfg.rl_weight * rl
        return Loss(loss, {"loss/student": loss.detach(), "loss/rl": rl.detach()})
