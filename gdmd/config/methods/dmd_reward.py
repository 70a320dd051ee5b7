"""Options of DMD with a reward on samples: ReFL, NFT, GRPO. Fields marked [I] are our inference, not in the papers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from gdmd.config.base import NonNegative, Positive, Probability
from gdmd.config.methods.base import GroupSize
from gdmd.config.methods.baseline import ReflMargin, UpdateRatioConfig


class RewardedDmdConfig(UpdateRatioConfig):
    """What the three share: the weight of a reward loss added to L_DMD."""

    rl_weight: NonNegative = Field(default=1.0, description="[I] Weight of the reward loss next to L_DMD; 0 is DMD.")

    @property
    def rewarded(self) -> bool:
        """Whether there is a reward loss at all."""
        return self.rl_weight > 0


class DMDReFLConfig(RewardedDmdConfig):
    """DMD + ReFL: the reward back-propagated through the decoder into the one student step (arXiv 2604.19009's DMDR)."""

    kind: Literal["dmd_refl"] = "dmd_refl"
    rl_weight: NonNegative = Field(
        default=1.2,
        description="Weight of L_ReFL next to L_DMD; 0 is DMD. DMDR's code has 0.3 for each of two rewards and a DMD loss "
        "with a factor 1/2, so 0.6 next to ours. Here the mean over rewards has one weight: 1.2 for two, 0.6 K for K.",
    )
    margin: ReflMargin = 0.7


class GroupedDmdConfig(RewardedDmdConfig):
    """What the two black-box methods share: several stochastic rollouts of one prompt, compared with each other."""

    images_per_prompt: GroupSize = Field(
        default=8,
        description="K: samples of one prompt in a batch, whose size it must divide (Shapes 8; DiffusionNFT, "
        "Flow-GRPO 24: arXiv 2509.16117, 2505.05470).",
    )
    spread: Literal["global", "group"] = Field(
        default="global",
        description="Standard deviation that divides the advantage: of the batch (DiffusionNFT's and Flow-GRPO's code) or "
        "of the group. Several rewards are summed first, as in their code, so one with a larger spread counts more: bring "
        "them to one scale with kind: composite.",
    )
    advantage_clip: Positive = Field(default=5.0, description="Largest |A| (DiffusionNFT's and Flow-GRPO's code: 5).")
    noise_level: Probability = Field(
        default=0.9,
        description="CPS noise of the rollouts: th = noise_level pi / 2; 0 is student_sampler = ode, 1 is renoise.",
    )

    @property
    def prompt_group(self) -> int:
        """images_per_prompt, also at weight 0: the same prompts."""
        return self.images_per_prompt


class DMDNFTConfig(GroupedDmdConfig):
    """DMD + NFT on samples (arXiv 2509.16117): scored samples, re-noised, against an EMA old policy."""

    kind: Literal["dmd_nft"] = "dmd_nft"
    rl_weight: NonNegative = Field(
        default=1.0,
        description="[I] Weight of L_NFT next to L_DMD; 0 is DMD. On Shapes with normalize = false, the norm of its "
        "gradient at weight 1 is 0.2 to 2.6 times that of L_DMD, and training diverges; 0.02 to 0.5 corresponds to 1/3 "
        "to 3 times the plain r, 1 - r loss.",
    )
    noise_level: Probability = Field(
        default=1.0,
        description="CPS noise of the rollouts, th = noise_level pi / 2 (arXiv 2604.19009 samples by an SDE); [I] 1 "
        "is student_sampler = renoise, in whose steps all noise is fresh; 0 is ode, whatever student_sampler says.",
    )
    beta: Positive = Field(
        default=0.1,
        description="beta of v+ and v- (DiffusionNFT's code: 0.1 for several rewards, as on Shapes; 1 for a single one).",
    )
    self_normalize: bool = Field(
        default=True, description="Divide each branch by its detached mean |x - target| (DiffusionNFT's code)."
    )
    old_decay: Probability = Field(
        default=0.5, description="Largest decay of the EMA old policy: min(1e-3 step, this) (DiffusionNFT's code: 0.5)."
    )
    nft_steps: tuple[Positive, ...] = Field(
        default=(),
        description="[I] Times t to which a scored sample is re-noised, one drawn per sample: as renoise_low, without the "
        "family's shift. Empty = the student's own, which are student_steps through that shift.",
    )

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if any(t > 1 for t in self.nft_steps):
            yield f"nft_steps must lie in (0, 1], got {list(self.nft_steps)}"

    @property
    def renoised_to(self) -> tuple[float, ...]:
        """The times of the NFT loss."""
        return self.nft_steps or self.student_steps


class DMDGRPOConfig(GroupedDmdConfig):
    """DMD + GRPO: policy gradients on the steps of the stochastic few-step student (Flow-GRPO, arXiv 2505.05470)."""

    kind: Literal["dmd_grpo"] = "dmd_grpo"
    rl_weight: NonNegative = Field(
        default=10.0,
        description="[I] Weight of L_GRPO next to L_DMD; at 1 its gradient is 2 to 5 % of L_DMD's on Shapes. 0 is DMD.",
    )
    noise_level: Probability = Field(
        default=0.9,
        gt=0,
        description="CPS noise of the policy, th = noise_level pi / 2 (Flow-GRPO and arXiv 2605.26108: 0.8 to 0.9).",
    )
    ratio_clip: Positive = Field(
        default=1e-4,
        description="PPO's clip of the ratio of mean log-probabilities (Flow-GRPO's scripts: 1e-4 to 1e-5); it acts "
        "from the second student update of an iteration on.",
    )

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if len(self.student_steps) < 2:
            yield (
                f"student_steps {list(self.student_steps)}: GRPO needs at least two steps; the move to the last state "
                "is the only random one, and a single step has none"
            )
