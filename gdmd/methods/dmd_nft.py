"""DMD + NFT on samples: L_DMD and DiffusionNFT's loss (arXiv 2509.16117) on scored rollouts of the old policy.

The baseline "DMD + NFT" of arXiv 2604.19009: the reward sees the finished few-step sample x_s, not the implicit target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd.config.methods.dmd_reward import DMDNFTConfig
from gdmd.diffusion.device import to_device_async
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import renoise
from gdmd.losses.nft import nft_loss, nft_optimality
from gdmd.methods.base import StudentBatch
from gdmd.methods.baseline import Baseline
from gdmd.methods.old_policy import EmaPolicy
from gdmd.methods.rollouts import Collected, collect, collection_stats
from gdmd.methods.scorer import Scorer
from gdmd.types import Loss, PromptBatch, Update


@dataclass(frozen=True)
class ScoredBatch(StudentBatch):
    """The student's batch with a scored sample, re-noised, and its reward weight."""

    x_s: Tensor  # [B, C, H, W], the scored sample
    x_t: Tensor  # [B, C, H, W], x_s re-noised to t
    t: Tensor  # [B]
    x0_old: Tensor  # [B, C, H, W], the old policy's prediction from x_t
    r: Tensor  # [B], NaN = not scored


@dataclass
class DmdNft(Baseline[DMDNFTConfig]):
    """DMD's iteration; each student update also learns from K scored samples of the old policy per prompt."""

    scorer: Scorer = field(kw_only=True)
    old: EmaPolicy = field(init=False)

    def __post_init__(self) -> None:
        self.old = EmaPolicy(self.roles, self.cfg.old_decay)

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        """One outer iteration: fake updates, scored rollouts, then one student update per collected gradient."""
        r = self.rollout(prompts, rng)
        batches = yield from self.fake_updates(r, prompts, rng, self.cfg.student_updates)
        if not self.cfg.rewarded:
            for batch in batches:
                yield Update("student", self.student_loss, batch)
            return
        self.old.start()
        policy = (self.roles.old, self.roles.schedule)
        collected = collect(*policy, self.scorer, self.cfg, prompts, rng, self.latent_shape)
        self._stats |= collection_stats(collected, self.scorer.rewards)
        for i, batch in enumerate(batches):
            yield Update("student", self.scored_loss, self.scored_batch(batch, collected, rng, i))
            self.old.follow()

    @torch.no_grad()
    def scored_batch(self, batch: StudentBatch, collected: Collected, rng: SampleRng, i: int) -> ScoredBatch:
        """Draw i of (t, eps) on the scored samples, and the old policy's predictions from there."""
        x_s, times = collected.trajectory.x0, self.cfg.renoised_to
        t = to_device_async(torch.tensor(times), x_s.device)[rng.integer("nft_t", len(times), i)]
        x_t = renoise(x_s, t, rng.normal("nft_eps", self.latent_shape, i), self.roles.schedule)
        optimal = nft_optimality(collected.advantage, self.cfg.advantage_clip)
        x0_old = self.roles.old(x_t, t, batch.cond).x0
        return ScoredBatch(**vars(batch), x_s=x_s, x_t=x_t, t=t, x0_old=x0_old, r=optimal)

    def scored_loss(self, batch: ScoredBatch) -> Loss:
        """L_DMD at x_tau + rl_weight L_NFT at x_t; an unscored sample has L_DMD only."""
        distill = self.student_loss(batch).per_sample
        x0 = self.roles.student(batch.x_t, batch.t, batch.cond).x0
        scored, clip = ~batch.r.isnan(), self.cfg.advantage_clip
        r, normalize = torch.where(scored, batch.r, 0.5), self.cfg.self_normalize
        nft = nft_loss(x0, batch.x0_old, batch.x_s, r, self.cfg.beta, scale=clip, normalize=normalize)
        nft = torch.where(scored, nft, 0.0)
        loss = distill + self.cfg.rl_weight * nft
        seen = {"loss/student": loss, "loss/nft": nft, "weight/r": batch.r}
        return Loss(loss, {name: value.detach() for name, value in seen.items()})

    def state(self) -> Mapping[str, Tensor]:
        """The number of student updates, on which the decay of the old policy depends."""
        return self.old.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.old.load(state)
