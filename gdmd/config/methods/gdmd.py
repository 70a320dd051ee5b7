"""Options of GDMD and of its controls. Fields marked [I] are not given in arXiv 2604.19009 and are our inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from gdmd.config.base import Count, NonNegative, Positive
from gdmd.config.methods.base import DistillationConfig
from gdmd.config.methods.removed import refuse_removed


class GDMDConfig(DistillationConfig):
    """GDMD, Algorithm 1 of arXiv 2604.19009; gamma = 0 is plain DMD at eta : eta."""

    kind: Literal["gdmd"] = "gdmd"
    group_size: Count = Field(
        default=4, description="eta: gradients collected, and student updates, per iteration [I]."
    )
    collection: Literal["all", "t", "fake"] = Field(
        default="all",
        description="DaGC: what varies within the group: t (one fake score), fake (one t and eps), or all = both.",
    )
    scored_step: NonNegative = Field(
        default=0.3,
        description="[I] s: the reward sees x0 - s grad. 1 is the implicit target itself, which often lies beyond the best "
        "step; 0 is the limit, the derivative of the reward along -grad, which needs one backward pass per reward for "
        "the whole group (differentiable rewards only).",
    )
    dmd_weight: NonNegative = Field(default=1.0, description="lambda, the weight of L_DMD [I].")
    gamma: NonNegative = Field(default=1.0, description="gamma, the weight of L_RL [I]; 0 is DMD.")
    beta: Positive = Field(default=1.0, description="beta of the positive and negative policies x+ and x- [I].")
    old_policy: Literal["snapshot", "ema"] = Field(
        default="snapshot", description="[I] x_old: the stored x0 of the iteration, or an EMA student's prediction."
    )

    @model_validator(mode="before")
    @classmethod
    def _removed(cls, given: Any) -> Any:
        return refuse_removed(given, cls.model_fields)

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.dmd_weight == self.gamma == 0:
            yield "dmd_weight 0 and gamma 0 leave the student no loss; set one of them above 0"

    @property
    def rewarded(self) -> bool:
        """Whether targets are scored."""
        return self.gamma > 0


class GDMDAblationConfig(GDMDConfig):
    """GDMD with r replaced, to see what its rewards contribute."""

    kind: Literal["gdmd_ablation"] = "gdmd_ablation"  # type: ignore[assignment]
    control: Literal["constant", "shuffled", "indicator"] = Field(
        default="shuffled",
        description="constant: r = its running mean; shuffled: r permuted over the batch; indicator: L_DMD "
        "weighted by 1[r > 1/2], without the pull toward x_old.",
    )

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.gamma == 0:
            yield (
                f"control {self.control!r} changes r, which gamma = 0 does not use; set gamma > 0, or use kind: gdmd"
            )
        if self.control == "indicator" and self.dmd_weight == 0:
            yield "control 'indicator' has no loss but L_DMD, whose dmd_weight is 0; set dmd_weight > 0"
