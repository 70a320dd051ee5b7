"""Options of GDMD. Fields marked [I] are not given in arXiv 2604.19009 and are our inference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gdmd.config.base import Count, NonNegative, Positive, Probability
from gdmd.config.methods.base import DistillationConfig


class GdmdConfig(DistillationConfig):
    """GDMD, Algorithm 1 of arXiv 2604.19009; gamma = 0 is plain DMD at eta : eta."""

    kind: Literal["gdmd"] = "gdmd"
    group_size: Count = Field(
        default=4, description="eta: gradients collected, and student updates, per iteration [I]."
    )
    collection: Literal["all", "t", "fake"] = Field(
        default="all",
        description="DaGC: what varies in the group: t (one fake), fake versions (one t, eps), or all (the best).",
    )
    score_target: Literal["raw", "normalized", "real", "continuation"] = Field(
        default="raw",
        description="[I] What the reward sees: raw = x0 + x0_real - x0_fake, normalized = x0 - grad (can leave "
        "the data manifold), real = x0_real; continuation (beyond the paper) = finished pictures, see `continuations`.",
    )
    continuations: Count = Field(
        default=8,
        description="score_target continuation: how often the sampler goes on from x0 with fresh noise. The ends y_k are "
        "scored, and the targets are x0 - grad + continuation_weight (y_k - mean y): the gradient of DMD towards the "
        "teacher tilted by the reward.",
    )
    continuation_weight: NonNegative = Field(
        default=6.0,
        description="Weight of y_k - mean y in the targets. On Shapes 6 with one student update per roll-out, 3 with "
        "four, which follow the same ends four times (8 drowns the teacher there).",
    )
    reward_gradient: NonNegative = Field(
        default=0.0,
        description="score_target continuation: weight of the rewards' own gradient at the first two ends, which the "
        "targets follow as if x0 moved with its ends; 0 = rewards stay black boxes. In units of mean R / Z against "
        "the mean square of L_DMD; needs differentiable rewards. gamma 0 uses none.",
    )
    dmd_weight: NonNegative = Field(default=1.0, description="lambda, the weight of L_DMD [I].")
    gamma: NonNegative = Field(default=1.0, description="gamma, the weight of L_RL [I]; 0 is DMD.")
    beta: Positive = Field(default=1.0, description="beta of the positive and negative policies x+ and x- [I].")
    old_policy: Literal["snapshot", "ema"] = Field(
        default="snapshot", description="[I] x_old: the stored x0 of the iteration, or an EMA student's prediction."
    )
    old_decay: Probability = Field(
        default=0.5, description="Largest decay of the EMA old policy: min(1e-3 step, this)."
    )
    z_decay: Probability = Field(default=0.99, description="[I] Decay of Z, the running std of each reward.")
    z_source: Literal["reward", "difference"] = Field(
        default="reward", description="[I] Z is the std of the targets' rewards, or of their gain over the sample's."
    )
    score_baseline: Literal["sample", "time"] = Field(
        default="sample",
        description="What a target's score is measured from: the sample's (the paper), or beyond it also the running "
        "mean of that difference at the target's t and guidance, so that rough targets are not at a disadvantage.",
    )
    control: Literal["none", "constant", "shuffled", "indicator"] = Field(
        default="none",
        description="Controls: r = its running mean; r (and what reward_gradient adds) shuffled inside the batch; weight "
        "1[r > 1/2] without the pull.",
    )
    scored_guidances: tuple[NonNegative, ...] = Field(
        default=(),
        description="Beyond the paper: also targets at these guidance scales, from the two teacher passes already "
        "made. Empty = only `guidance`.",
    )
    student_target: Literal["each", "mean"] = Field(
        default="each",
        description="each = eta student updates, one per collected gradient (Algorithm 1); mean = eta updates towards "
        "the weighted mean of the whole group, which has less noise. Softmax weighting only.",
    )
    weighting: Literal["napo", "softmax"] = Field(
        default="napo",
        description="napo = the paper's positive / negative loss; softmax = targets weighted by "
        "E softmax(gamma (R - R_sample) / Z) over the whole group, no negative policy.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> GdmdConfig:
        if self.control != "none" and self.gamma == 0:
            raise ValueError(
                f"control {self.control!r} changes r, which gamma = 0 does not use; set gamma > 0 or no control"
            )
        if self.student_target == "mean" and self.weighting != "softmax":
            raise ValueError("student_target 'mean' is the weighted mean of weighting 'softmax'; set both, or 'each'")
        if self.score_target == "continuation":
            self._continues()
        elif self.reward_gradient > 0:
            raise ValueError(
                f"reward_gradient {self.reward_gradient:g} is taken at finished ends, which score_target "
                f"{self.score_target!r} does not make; use 'continuation' or reward_gradient 0"
            )
        if self.control in ("constant", "indicator") and self.reward_gradient > 0:
            raise ValueError(
                f"control {self.control!r} does not reach reward_gradient {self.reward_gradient:g}, which weighs no score: "
                "set reward_gradient 0, or control 'shuffled', which gives each sample the gradient of another"
            )
        if self.weighting == "softmax" and self.control in ("indicator", "constant"):
            raise ValueError(f"control {self.control!r} is defined for weighting 'napo'; use 'shuffled' or gamma=0")
        return self

    def _continues(self) -> None:
        """ValueError for what does not go with score_target 'continuation'."""
        if len(self.student_steps) < 2 or self.continuations < 2:
            raise ValueError(
                f"score_target 'continuation' compares ends of one roll-out: it needs at least 2 student_steps and 2 "
                f"continuations, got {len(self.student_steps)} and {self.continuations}"
            )
        if self.scored_guidances:
            raise ValueError(
                f"score_target 'continuation' makes its own group; scored_guidances must be empty, got "
                f"{list(self.scored_guidances)}"
            )
        if self.score_baseline == "time":
            raise ValueError(
                "score_baseline 'time' is for targets re-noised to t; a continuation has no t: use 'sample'"
            )

    @property
    def rewarded(self) -> bool:
        """Whether targets are scored."""
        return self.gamma > 0

    @property
    def exchanged(self) -> bool:
        """Whether samples get the reward gradient of another, the control of it."""
        return self.control == "shuffled" and self.reward_gradient > 0

    @property
    def continued(self) -> bool:
        """Whether the sampler is continued from x0 to be scored."""
        return self.rewarded and self.score_target == "continuation"

    @property
    def compares_sample(self) -> bool:
        """Whether weights depend on the score of the sample x0 itself: a softmax over its own targets does not."""
        apart = self.z_source == "difference" or self.score_baseline == "time" or self.control == "shuffled"
        return self.rewarded and (self.weighting == "napo" or apart)

    @property
    def shares_scores(self) -> bool:
        """Whether all draws score the same latents: rollouts, or the frozen teacher's prediction at one (t, eps)."""
        return self.continued or (self.score_target == "real" and self.collection == "fake")

    @property
    def targets(self) -> int:
        """Targets of one collected gradient."""
        return self.continuations if self.continued else len(self.guidances)

    @property
    def guidances(self) -> tuple[float, ...]:
        """The guidance scales of one teacher evaluation's targets."""
        return self.scored_guidances or (self.guidance,)
