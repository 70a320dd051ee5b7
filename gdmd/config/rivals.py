"""Options of DMD2 and DMDR. Fields marked [I] are not in their papers or code and are our inference."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gdmd.config.base import Count, Finite, NonNegative, NonNegativeCount, Positive, Probability
from gdmd.config.distillation import DistillationConfig

BetaShape = Annotated[Positive, Field(ge=1)]
"""A shape parameter of a Beta distribution with a bounded density."""

GroupSize = Annotated[Count, Field(ge=2)]
"""A group of one has neither an advantage nor a pair."""


class Dmd2Config(DistillationConfig):
    """DMD2 (arXiv 2405.14867): no regression, 5 fake updates per student update, a GAN on the fake's features."""

    kind: Literal["dmd2"] = "dmd2"
    fake_updates: Count = Field(
        default=5, description="Fake (and head) updates per student update (arXiv 2405.14867, section 4.2: 5 : 1)."
    )
    gan_weight: NonNegative = Field(
        default=5e-3,
        description="Weight of the student's GAN loss (DMD2's SDXL script, whose DMD loss has a 1/2 that ours has not).",
    )
    head_weight: NonNegative = Field(
        default=1e-2,
        description="Weight of the head's GAN loss in the fake's update; it also trains the fake (DMD2's SDXL script). "
        "The head shares the fake's optimiser and learning rate, as in DMD2's code.",
    )
    gan_low: Probability = Field(
        default=0.0, description="Lowest re-noising t of the head's input (DMD2's script: 0 of 1000)."
    )
    gan_high: Probability = Field(
        default=1.0, description="Highest re-noising t of the head's input (DMD2's script: 1000 of 1000)."
    )

    @model_validator(mode="after")
    def _trained_head(self) -> Dmd2Config:
        if self.gan_low >= self.gan_high:
            raise ValueError(f"gan_low {self.gan_low} must be below gan_high {self.gan_high}")
        if self.gan_weight > 0 and self.head_weight == 0:
            raise ValueError(
                f"gan_weight {self.gan_weight} with head_weight 0 follows a head that is never trained; "
                "set head_weight > 0, or gan_weight = 0 for no GAN"
            )
        return self

    @property
    def adversarial(self) -> bool:
        """Whether there is a GAN head at all."""
        return self.gan_weight > 0


class DmdrConfig(DistillationConfig):
    """DMDR (arXiv 2511.13649v4): reward-tilted DMD with annealed schedules, then DMD with a reward loss."""

    kind: Literal["dmdr"] = "dmdr"
    fake_updates: Count = Field(
        default=5, description="Fake updates per student update (DMDR's scripts, ratio-update 5)."
    )
    cold_start: NonNegativeCount = Field(
        default=2000,
        description="Student updates of stage 1, without the reward loss; 0 = none (DMDR's SD3 script: 2000 of 4000).",
    )
    tilt: NonNegative = Field(
        default=1.0,
        description="RT-DM in stage 1: DMD's weight is exp(tilt r / ||r||) (arXiv 2511.13649v4: 1; the norm is the "
        "batch's [I]); 0 = plain DMD.",
    )
    anneal: NonNegativeCount = Field(
        default=2000,
        description="Student updates over which the cosine of DynaDG and DynaRS falls from 1 to 0 (DMDR's SD3 script, "
        "dynamic-step); 0 = neither schedule.",
    )
    overlap: Probability = Field(
        default=0.25,
        description="DynaDG: largest share of the fake's displacement in the real score. DMDR's SD3 script has LoRA "
        "scale .5 in the real score and 2 in the fake: .25 (SiT: .75 / 2). 0 = the teacher.",
    )
    beta_a: BetaShape = Field(default=4.0, description="DynaRS: a of Beta(1 + (a-1) c, 1 + (b-1) c) (DMDR's scripts).")
    beta_b: BetaShape = Field(default=1.5, description="DynaRS: b of the same (DMDR's scripts).")
    rl_weight: NonNegative = Field(
        default=0.5, description="lambda_rl, the weight of the reward loss in stage 2 (arXiv 2511.13649v4); 0 = DMD."
    )
    strategy: Literal["refl", "grpo", "dpo"] = Field(
        default="refl", description="Reward loss of stage 2: ReFL (DMDR's published trainer), GRPO or Diffusion-DPO."
    )
    margin: Finite = Field(
        default=0.7,
        description="m of ReFL's hinge relu(m - R), for each reward in its own units (DMDR's code; CLIP and HPS stay "
        "below it, so that it acts at all times there).",
    )
    images_per_prompt: GroupSize = Field(
        default=8,
        description="GRPO, DPO: samples of one prompt in a batch, whose size it must divide (Shapes 8; Flow-GRPO 24, "
        "arXiv 2505.05470). ReFL has one per prompt.",
    )
    spread: Literal["global", "group"] = Field(
        default="global", description="GRPO: std under the advantage, of the batch (Flow-GRPO's code) or of the group."
    )
    advantage_clip: Positive = Field(default=5.0, description="GRPO: largest |A| (Flow-GRPO's code: 5).")
    noise_level: Annotated[Probability, Field(gt=0)] = Field(
        default=0.9,
        description="GRPO: CPS noise of the policy, th = noise_level pi / 2 (Flow-GRPO and arXiv 2605.26108: .8 to .9).",
    )
    ratio_clip: Positive = Field(
        default=1e-4, description="GRPO: PPO's clip of the ratio of mean log-probabilities (Flow-GRPO: 1e-5 to 1e-4)."
    )
    dpo_beta: Positive = Field(
        default=10.0,
        description="[I] beta of Diffusion-DPO on mean errors. Its authors' 2000 to 5000 (arXiv 2311.12908) is for DPO "
        "alone: beside L_DMD that gradient, beta / 4 times a regression's, would leave nothing of DMD after clipping.",
    )

    @model_validator(mode="after")
    def _enough_steps(self) -> DmdrConfig:
        if self.strategy == "grpo" and self.rl_weight > 0 and len(self.student_steps) < 2:
            raise ValueError(f"strategy 'grpo' needs a student of at least 2 steps, got {list(self.student_steps)}")
        return self

    @property
    def rewarded(self) -> bool:
        """Whether any loss needs a reward."""
        return self.rl_weight > 0 or (self.tilt > 0 and self.cold_start > 0)

    @property
    def prompt_group(self) -> int:
        """The group of GRPO and DPO; 1 without them."""
        return self.images_per_prompt if self.strategy != "refl" and self.rl_weight > 0 else 1
