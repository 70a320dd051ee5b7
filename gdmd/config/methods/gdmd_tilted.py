"""Options of tilted GDMD, which is ours and not in arXiv 2604.19009, and of its control."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from gdmd.config.base import Count, NonNegative, Positive
from gdmd.config.methods.base import DistillationConfig, GroupSize
from gdmd.config.methods.removed import refuse_removed


class TiltedGDMDConfig(DistillationConfig):
    """Tilted GDMD: rewards score finished rollouts and tilt the DMD target; gamma = 0 is plain DMD at eta : eta."""

    kind: Literal["gdmd_tilted"] = "gdmd_tilted"
    group_size: Count = Field(
        default=4,
        description="eta: fake-score updates, gradients and student updates per iteration. All student updates follow "
        "the mean target.",
    )
    extra_fake_updates: int = Field(
        default=0,
        ge=0,
        description="Updates of the fake score on each rollout before the eta ones. A more accurate fake score keeps "
        "the student closer to the teacher: on Shapes, 2 extra updates reduced reward hacking.",
    )
    continuations: GroupSize = Field(
        default=8,
        description="K: number of rollouts from x0 to a finished sample y_k, each with fresh noise; with "
        "student_sampler = ode only their first step has fresh noise.",
    )
    continuation_weight: NonNegative = Field(
        default=6.0,
        description="kappa: weight of sum_k w_k (y_k - mean y) in the target. On Shapes 6 with one student update per "
        "rollout, 3 with four, which follow the same samples four times (with 8 the reward outweighs the teacher there).",
    )
    gamma: NonNegative = Field(
        default=2.0, description="Sharpness of w = softmax(gamma R(y_k) / Z) over the K samples; 0 is DMD."
    )
    reward_gradient: NonNegative = Field(
        default=0.0,
        description="Weight of the reward gradient at the first two finished samples, as if x0 moved with them; 0 = "
        "rewards are black boxes. It weights mean R / Z relative to the mean square of L_DMD; needs differentiable rewards. "
        "Unused at gamma 0.",
    )
    dmd_weight: Positive = Field(default=1.0, description="Weight of the loss.")

    @model_validator(mode="before")
    @classmethod
    def _removed(cls, given: Any) -> Any:
        return refuse_removed(given, cls.model_fields)

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if len(self.student_steps) < 2:
            yield (
                "continuations follow the first of at least 2 student_steps, got "
                f"{list(self.student_steps)}; add a step, or use kind: gdmd"
            )

    @property
    def rewarded(self) -> bool:
        """Whether rollouts are finished and scored."""
        return self.gamma > 0


class ShuffledTiltedGDMDConfig(TiltedGDMDConfig):
    """The control of tilted GDMD: scores permuted over the batch, and each sample gets the reward gradient of another."""

    kind: Literal["gdmd_tilted_shuffled"] = "gdmd_tilted_shuffled"  # type: ignore[assignment]

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.gamma == 0:
            yield "kind gdmd_tilted_shuffled permutes scores, which gamma = 0 does not use; set gamma > 0"
