"""Options of DMDR (arXiv 2511.13649v4). Fields marked [I] are not in its paper or code and are our inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from gdmd.config.base import NonNegative, NonNegativeCount, Positive, Probability
from gdmd.config.methods.base import GroupSize
from gdmd.config.methods.baseline import BaselineConfig, ReflMargin

BetaShape = Annotated[Positive, Field(ge=1)]
"""A shape parameter of a Beta distribution with a bounded density."""


class DMDRConfig(BaselineConfig):
    """DMDR (arXiv 2511.13649v4): reward-tilted DMD with annealed schedules, then DMD with a reward loss."""

    kind: Literal["dmdr"] = "dmdr"
    renoise_x0: bool = Field(
        default=True,
        description="Train the student at its own x0 of step tau, re-noised to tau (DMDR's sampler), which costs one more "
        "forward pass; false = at x_tau of the rollout, as in DMD2. No effect with student_sampler = ode, whose predicted "
        "noise leads back to x_tau.",
    )
    cold_start: NonNegativeCount = Field(
        default=2000,
        description="Student updates of stage 1, without the reward loss; 0 = none (DMDR's SD3 script: 2000 of 4000).",
    )
    tilt: NonNegative = Field(
        default=1.0,
        description="RT-DM in stage 1: DMD's weight is exp(tilt z), z the normalized reward of the finished image (arXiv "
        "2511.13649v4: 1), mean over rewards; 0 = plain DMD.",
    )
    tilt_unit: Literal["std", "norm"] = Field(
        default="std",
        description="z of RT-DM: std [I] = (r - mean) / std over the batch; norm = r / ||r||_2 over the batch, the paper's "
        "formula taken literally: exp(z) is then 1.19 +- 2 % at a batch of 32, because rewards are positive and similar, so "
        "stage 1 hardly uses them. Its published code has no RT-DM to compare with.",
    )
    anneal: NonNegativeCount = Field(
        default=2000,
        description="Student updates over which the cosine of DynaDG and DynaRS falls from 1 to 0 (DMDR's SD3 script, "
        "dynamic-step); 0 = neither schedule.",
    )
    overlap: Probability = Field(
        default=0.25,
        description="DynaDG: largest share of the fake score's displacement in the real score. DMDR's SD3 script has LoRA "
        "scale 0.5 in the real score and 2 in the fake score: 0.25 (SiT: 0.75 / 2). 0 = the teacher.",
    )
    beta_a: BetaShape = Field(default=4.0, description="DynaRS: a of Beta(1 + (a-1) c, 1 + (b-1) c) (DMDR's scripts).")
    beta_b: BetaShape = Field(default=1.5, description="DynaRS: b of the same (DMDR's scripts).")
    rl_weight: NonNegative = Field(
        default=1.2,
        description="lambda_rl, the weight of the reward loss in stage 2; 0 = DMD. ReFL: DMDR's code has 0.3 for each of "
        "two rewards and a DMD loss with a factor 1/2, so 0.6 next to ours. Here the mean over rewards has one weight: 1.2 "
        "for two, 0.6 K for K. Its paper has 0.5, which would be 1.0. GRPO, DPO: [I].",
    )
    strategy: Literal["refl", "grpo", "dpo"] = Field(
        default="refl", description="Reward loss of stage 2: ReFL (DMDR's published trainer), GRPO or Diffusion-DPO."
    )
    margin: ReflMargin = 0.7
    images_per_prompt: GroupSize = Field(
        default=8,
        description="GRPO, DPO: samples of one prompt in a batch, whose size it must divide (Shapes 8; Flow-GRPO 24, "
        "arXiv 2505.05470). ReFL has one per prompt.",
    )
    spread: Literal["global", "group"] = Field(
        default="global",
        description="GRPO: standard deviation that divides the advantage: of the batch (Flow-GRPO's code) or group.",
    )
    advantage_clip: Positive = Field(default=5.0, description="GRPO: largest |A| (Flow-GRPO's code: 5).")
    noise_level: Annotated[Probability, Field(gt=0)] = Field(
        default=0.9,
        description="GRPO: CPS noise of the policy, th = noise_level pi / 2 (Flow-GRPO and arXiv 2605.26108: 0.8 to 0.9).",
    )
    ratio_clip: Positive = Field(
        default=1e-4, description="GRPO: PPO's clip of the ratio of mean log-probabilities (Flow-GRPO: 1e-5 to 1e-4)."
    )
    dpo_beta: Positive = Field(
        default=10.0,
        description="[I] beta of Diffusion-DPO on mean errors. Its authors use 2000 to 5000 (arXiv 2311.12908) for DPO "
        "alone; next to L_DMD such a gradient, beta / 4 times a regression's, would leave nothing of DMD after clipping.",
    )

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.renoise_x0 and self.student_input == "data":
            yield (
                "renoise_x0 trains the student at its own x0, and student_input 'data' at noised real images; "
                "set renoise_x0 = false or student_input = simulation"
            )
        if self.strategy == "grpo" and self.rl_weight > 0 and len(self.student_steps) < 2:
            yield f"strategy 'grpo' needs a student of at least 2 steps, got {list(self.student_steps)}"

    @property
    def trains_renoised(self) -> bool:
        """Whether the student is trained at its own re-noised x0."""
        return self.renoise_x0 and self.student_sampler == "renoise"

    @property
    def mixes(self) -> bool:
        """Whether the real score is ever mixed with the fake score."""
        return self.overlap > 0 and self.anneal > 0

    @property
    def rewarded(self) -> bool:
        """Whether any loss needs a reward."""
        return self.rl_weight > 0 or (self.tilt > 0 and self.cold_start > 0)

    @property
    def prompt_group(self) -> int:
        """The group of GRPO and DPO; 1 without them."""
        return self.images_per_prompt if self.strategy != "refl" and self.rl_weight > 0 else 1
