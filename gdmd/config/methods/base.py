"""What every distillation method has options for. Fields marked [I] are not given in arXiv 2604.19009."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gdmd.config.base import Config, Count, NonNegative, Positive, Probability
from gdmd.types import StudentSampler

GroupSize = Annotated[Count, Field(ge=2)]
"""Samples that are compared with each other: a group of one has no advantage."""


def _uniform_steps(given: Any) -> Any:
    """N -> (1, (N-1)/N, ..., 1/N)."""
    if not isinstance(given, int) or isinstance(given, bool):
        return given
    if not 1 <= given <= 1000:
        raise ValueError("should be a number of steps from 1 to 1000, or a list of times like [1, 0.5]")
    return tuple((given - k) / given for k in range(given))


def _falling(steps: tuple[float, ...]) -> tuple[float, ...]:
    if not steps or steps[0] > 1 or any(a <= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError("should fall strictly from at most 1, like [1, 0.75, 0.5, 0.25]")
    return steps


class DistillationConfig(Config):
    """What every method of the family shares: the rollout, the re-noising and the two DMD losses."""

    guidance: NonNegative = Field(
        default=5.0,
        description="Teacher's classifier-free guidance inside DMD; 1 runs no unconditional pass. "
        "Shapes 5 (best of the teacher's own sweep); SD3-M 7, SDXL 8 (arXiv 2605.26108, 2405.14867).",
    )
    student_steps: Annotated[tuple[Positive, ...], BeforeValidator(_uniform_steps), AfterValidator(_falling)] = Field(
        default=(1.0, 0.75, 0.5, 0.25),
        description="[I] Times of the student's steps, from noise: uniform before the family's shift. A number N stands "
        "for N uniform steps: 4 is [1, 0.75, 0.5, 0.25].",
    )
    student_sampler: StudentSampler = Field(
        default="renoise",
        description="How the student gets from step to step: renoise = x0 with fresh noise (DMD2, LCM); ode = x0 with the "
        "predicted noise (Euler, DDIM), as klein, Lightning, Z-Image-Turbo and SD3.5-Turbo are sampled. Used by training, "
        "validation and exports; rollouts of GRPO and NFT use noise_level instead.",
    )
    step_draw: Literal["sample", "batch"] = Field(
        default="sample",
        description="[I] Draw the student's step tau per sample (cheap rollouts) or once for the batch (large models).",
    )
    student_input: Literal["simulation", "data"] = Field(
        default="simulation",
        description="Where x_tau comes from: the student's own rollout (backward simulation, arXiv 2405.14867) or noised "
        "real latents.",
    )
    renoise_low: Probability = Field(
        default=0.02,
        description="Lowest t of the DMD gradient (DMD2 clamps to 0.02); t is uniform above it. In flow models t is sigma, "
        "without the family's shift, as in FastGen (the code of arXiv 2605.26108 shifts it: mean sigma 0.68, not 0.5).",
    )
    renoise_high: Probability = Field(default=0.98, description="Highest t of the DMD gradient.")
    fake_loss: Literal["native", "x0"] = Field(
        default="native",
        description="native = mean square error of what the network predicts: eps, v or velocity (DMD2, DMDR); "
        "x0 = the paper's eq. 2, which weights noisy t most.",
    )
    normalize: bool = Field(
        default=True,
        description="Divide the regressed gradient by DMD2's per-sample normalizer n; false keeps x0_fake - x0_real, which "
        "was better on Shapes and on its SD3 pipeline, and made no difference on its SDXL pipeline (docs/LOG.md, entry 34).",
    )

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.renoise_low >= self.renoise_high:
            yield f"renoise_low {self.renoise_low} must be below renoise_high {self.renoise_high}"

    @property
    def rewarded(self) -> bool:
        """Whether a loss reads rewards, so that a recipe must name some."""
        return False

    @property
    def prompt_group(self) -> int:
        """Samples of each prompt in a batch: above 1 for methods that compare images of one prompt."""
        return 1
