"""What flow model families share: they predict a velocity, at times shifted by their scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.device import DTYPES
from gdmd.diffusion.schedule import FlowSchedule, from_velocity
from gdmd.models.families.base import Family
from gdmd.models.packing import unpack
from gdmd.models.schedulers import FlowSettings, read_flow
from gdmd.models.timesteps import FlowTimesteps, uniform_times
from gdmd.types import Prediction, StudentSampler


class FlowFamily(Family):
    """x_t = (1 - t) x0 + t eps. Teacher and student use Euler's method, whatever solver the pipeline was saved with.

    ``max_shift`` and ``max_image_tokens``: the pipeline's defaults for dynamic shifting if its scheduler config has none.
    """

    native = "velocity"
    max_shift: ClassVar[float] = 1.15
    max_image_tokens: ClassVar[int] = 4096

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        if cfg.guidance_rescale:
            raise ValueError(
                f"model.guidance_rescale = {cfg.guidance_rescale:g}: a {self.pipeline} does not use it; only UNets "
                "with a beta schedule do; leave it out"
            )
        self.net = pipe.transformer
        self.schedule = FlowSchedule()
        self.settings = self.read_settings(pipe.scheduler, cfg.what)

    @classmethod
    def read_settings(cls, scheduler: Any, model: str) -> FlowSettings:
        """The times of the family's pipeline with this scheduler; ``model`` starts the message of a ValueError."""
        return read_flow(scheduler, model, cls.max_shift, cls.max_image_tokens)

    def prediction(self, output: Any, x_t: Tensor, t: Tensor) -> Prediction:
        """Convert a velocity in 2 x 2 patches, which most of these networks return; other families override this."""
        return from_velocity(unpack(output, *x_t.shape[-2:]), x_t, t, self.schedule)

    def student_scheduler(self, sampler: StudentSampler) -> str:
        return "FlowMatchEulerDiscreteScheduler"

    def student_settings(self, steps: int, sampler: StudentSampler) -> dict[str, Any]:
        return self.settings.few_steps(sampler)

    @property
    def tokens(self) -> int:
        """Number of image tokens at this size, for dynamic shifting."""
        _, height, width = self.latent_shape
        return (height // self.patch) * (width // self.patch)

    def network_time(self, t: Tensor) -> Tensor:
        """The pipeline's timestep / 1000: t itself for num_train_timesteps = 1000."""
        return t * (self.settings.train_steps / 1000)

    def rounded(self, number: Tensor) -> Tensor:
        """Round to the dtype of the frozen weights, as the frozen network does, for its fp32 copies, too."""
        return number.to(DTYPES[self.cfg.dtype])

    def mu(self, steps: int) -> float | None:
        """mu of dynamic shifting for ``steps`` steps; None = linear in the image tokens, between the scheduler's shifts."""
        del steps
        return None

    def timesteps_for(self, steps: int) -> FlowTimesteps:
        """The timestep mapping for ``steps`` steps at this size."""
        return self.settings.timesteps(self.tokens, self.mu(steps))

    def student_times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        return self.timesteps_for(len(uniform)).student(uniform)

    def uniform_times(self, times: Sequence[float]) -> tuple[float, ...]:
        return self.timesteps_for(len(times)).uniform(times)

    def teacher_times(self, steps: int) -> Tensor:
        return self.timesteps_for(steps).teacher(uniform_times(steps))

    def evenly_to_the_last(self, steps: int) -> Tensor:
        """Times of pipelines that leave them to the Euler scheduler: evenly spaced to its last training time, then shifted.

        A constant shift is already part of that last time.
        """
        shortest = 1 / self.settings.train_steps
        mapping = self.timesteps_for(steps)
        last, between = shortest if self.settings.dynamic else mapping.student([shortest])[0], max(steps - 1, 1)
        return mapping.teacher([1 - (1 - last) * i / between for i in range(steps)])
