"""What DMD and the baselines around it have options for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from gdmd.config.base import Count, Finite
from gdmd.config.methods.base import DistillationConfig

ReflMargin = Annotated[
    Finite,
    Field(
        description="m of ReFL's hinge relu(m - R), for each reward in its own units (DMDR's code: 0.7; CLIP and HPS stay "
        "below it, so the hinge is always active there); the mean over rewards is taken after the hinge [I]."
    ),
]


class BaselineConfig(DistillationConfig):
    """Several updates of the fake score before the student's."""

    fake_updates: Count = Field(
        default=5,
        description="Fake-score updates per outer iteration (arXiv 2405.14867, section 4.2; DMDR's scripts: 5 : 1).",
    )
    fake_samples: Literal["fresh", "shared"] = Field(
        default="fresh",
        description="What the fake score learns from: fresh = new prompts, noise and rollout for every update but the "
        "first, which has the student's batch (the code of DMD2, DMDR, FastGen and arXiv 2605.26108); shared = the "
        "student's batch in all of them, as in GDMD, which needs fewer passes (used for docs/results.md).",
    )


class UpdateRatioConfig(BaselineConfig):
    """Also several student updates per iteration."""

    student_updates: Count = Field(
        default=1,
        description="Student updates per iteration, all on one rollout; each uses the gradient after one of the last "
        "fake-score updates.",
    )

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.student_updates > self.fake_updates:
            yield (
                f"student_updates {self.student_updates} must not exceed fake_updates {self.fake_updates}: "
                "each student update follows the gradient of one updated fake score"
            )
