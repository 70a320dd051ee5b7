"""Options of DMD (arXiv 2311.18828). Fields marked [I] are not in the paper and are our inference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gdmd.config.base import Count, NonNegative, NonNegativeCount
from gdmd.config.methods.baseline import UpdateRatioConfig


class DMDConfig(UpdateRatioConfig):
    """Distribution matching distillation (arXiv 2311.18828) with DMD2's normalizer and update ratio."""

    kind: Literal["dmd"] = "dmd"
    regression_weight: NonNegative = Field(
        default=0.0,
        description="Weight of DMD1's regression on teacher ODE pairs; 0 = none, as in DMD2 (arXiv 2311.18828: 0.25, "
        "with LPIPS instead of the mean square of latents used here).",
    )
    regression_steps: Count = Field(
        default=50, description="Steps of the teacher's ODE for a pair, guided (50 NFE of PNDM, arXiv 2311.18828)."
    )
    regression_batches: NonNegativeCount = Field(
        default=8,
        description="[I] Batches of pairs that are computed once, kept and used in turn (arXiv 2311.18828 keeps all "
        "pairs on disk); 0 = new pairs in every iteration.",
    )
