"""Options of DMD2 (arXiv 2405.14867). Fields marked [I] are not in the paper or its code and are our inference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from gdmd.config.base import NonNegative, Probability
from gdmd.config.methods.baseline import BaselineConfig


class DMD2Config(BaselineConfig):
    """DMD2 (arXiv 2405.14867): no regression, 5 fake-score updates per student update, a GAN head."""

    kind: Literal["dmd2"] = "dmd2"
    gan_weight: NonNegative = Field(
        default=1e-2,
        description="Weight of the student's GAN loss: twice the 5e-3 of DMD2's SDXL script, whose DMD loss has a factor "
        "1/2 that ours does not have.",
    )
    head_weight: NonNegative = Field(
        default=1e-2,
        description="Weight of the head's GAN loss in the fake score's update, which it also trains (DMD2's SDXL script; "
        "its denoising loss, like ours, has no factor 1/2). The head shares the fake score's optimizer and learning rate, "
        "as in DMD2's code.",
    )
    gan_low: Probability = Field(
        default=0.0, description="Lowest re-noising t of the head's input (DMD2's script: 0 of 1000)."
    )
    gan_high: Probability = Field(
        default=1.0, description="Highest re-noising t of the head's input (DMD2's script: 1000 of 1000)."
    )

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.gan_low >= self.gan_high:
            yield f"gan_low {self.gan_low} must be below gan_high {self.gan_high}"
        if self.gan_weight > 0 and self.head_weight == 0:
            yield (
                f"gan_weight {self.gan_weight} with head_weight 0 follows a head that is never trained; "
                "set head_weight > 0, or gan_weight = 0 for no GAN"
            )

    @property
    def adversarial(self) -> bool:
        """Whether there is a GAN head at all."""
        return self.gan_weight > 0
