"""Options of the distillation methods. Fields marked [I] are not given in arXiv 2604.19009 and are our inference."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gdmd.config.base import Config, Count, NonNegative, Positive, Probability


class DistillationConfig(Config):
    """What every method of the family shares: the roll-out, the re-noising and the two DMD losses."""

    guidance: NonNegative = Field(
        default=5.0,
        description="Teacher's classifier-free guidance inside DMD; 1 makes no unconditional pass. "
        "Shapes 5 (best of the teacher's own sweep); SD3-M 7, SDXL 8 (arXiv 2605.26108, 2405.14867).",
    )
    student_steps: tuple[Positive, ...] = Field(
        default=(1.0, 0.75, 0.5, 0.25),
        description="[I] Times of the student's steps, from noise: uniform before the family's shift.",
    )
    step_draw: Literal["sample", "batch"] = Field(
        default="sample",
        description="[I] tau is drawn per sample (cheap roll-outs) or once for the whole batch (large models).",
    )
    student_input: Literal["simulation", "data"] = Field(
        default="simulation",
        description="x_tau from the student's own roll-out (backward simulation, arXiv 2405.14867) or real latents.",
    )
    renoise_low: Probability = Field(default=0.02, description="Lowest t of the DMD gradient (DMD2 clamps to .02).")
    renoise_high: Probability = Field(default=0.98, description="Highest t of the DMD gradient.")
    fake_loss: Literal["native", "x0"] = Field(
        default="native",
        description="native = eps- or velocity-MSE (DMD2, DMDR); x0 = the paper's eq. 2, whose weight sits at late t.",
    )
    normalise: bool = Field(
        default=True,
        description="Divide the regressed gradient by DMD2's per-sample normaliser n; false keeps x0_fake - x0_real.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> DistillationConfig:
        steps = self.student_steps
        if not steps or steps[0] > 1 or any(a <= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"student_steps must fall strictly from at most 1, got {list(steps)}")
        if self.renoise_low >= self.renoise_high:
            raise ValueError(f"renoise_low {self.renoise_low} must be below renoise_high {self.renoise_high}")
        return self


class DmdConfig(DistillationConfig):
    """Distribution matching distillation (arXiv 2311.18828) with DMD2's normaliser and update ratio."""

    kind: Literal["dmd"] = "dmd"
    fake_updates: Count = Field(default=5, description="Fake updates per outer iteration (DMD2: 5 : 1).")
    student_updates: Count = Field(
        default=1, description="Student updates per iteration; the last so many fakes give one gradient each."
    )

    @model_validator(mode="after")
    def _enough_fakes(self) -> DmdConfig:
        if self.student_updates > self.fake_updates:
            raise ValueError(
                f"student_updates {self.student_updates} must not exceed fake_updates {self.fake_updates}: "
                "each student update follows the gradient of one updated fake"
            )
        return self


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
    score_target: Literal["raw", "normalised", "real"] = Field(
        default="raw",
        description="[I] What the reward sees: raw = x0 + x0_real - x0_fake, normalised = x0 - grad (can leave "
        "the data manifold), real = x0_real.",
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
    control: Literal["none", "constant", "shuffled", "indicator"] = Field(
        default="none",
        description="Controls: r = its running mean; r shuffled inside the batch; weight 1[r > 1/2] without the pull.",
    )
    scored_guidances: tuple[NonNegative, ...] = Field(
        default=(),
        description="Beyond the paper: also targets at these guidance scales, from the two teacher passes already "
        "made. Empty = only `guidance`.",
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
        if self.weighting == "softmax" and self.control in ("indicator", "constant"):
            raise ValueError(f"control {self.control!r} is defined for weighting 'napo'; use 'shuffled' or gamma=0")
        return self

    @property
    def guidances(self) -> tuple[float, ...]:
        """The guidance scales of one teacher evaluation's targets."""
        return self.scored_guidances or (self.guidance,)


MethodConfig = Annotated[DmdConfig | GdmdConfig, Field(discriminator="kind")]
