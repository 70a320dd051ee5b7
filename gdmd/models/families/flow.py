"""What the families of flow models share: they predict a velocity, at times that their scheduler shifts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from gdmd.config.model import DiffusersModel
from gdmd.diffusion.schedule import FlowSchedule
from gdmd.models.families.base import Family
from gdmd.models.schedulers import read_flow
from gdmd.models.timesteps import FlowClock, uniform_times


class FlowFamily(Family):
    """x_t = (1 - t) x0 + t eps. Teacher and student follow Euler's method, whatever solver the pipeline was saved with.

    ``max_shift``: what the pipeline assumes for dynamic shifting where its scheduler has none.
    """

    native = "velocity"
    max_shift: ClassVar[float] = 1.15
    clock: FlowClock

    def __init__(self, pipe: Any, cfg: DiffusersModel) -> None:
        super().__init__(pipe, cfg)
        if cfg.guidance_rescale:
            raise ValueError(
                f"model.guidance_rescale = {cfg.guidance_rescale:g}: a {self.pipeline} has none; only UNets with a beta "
                "schedule do; leave it out"
            )
        self.schedule = FlowSchedule()
        self.times = read_flow(pipe.scheduler, f"model.path {cfg.path!r}", self.max_shift)

    @property
    def student_scheduler(self) -> str:
        return "FlowMatchEulerDiscreteScheduler"

    def student_settings(self, steps: int) -> dict[str, Any]:
        return self.times.stochastic()

    @property
    def tokens(self) -> int:
        """The number of image tokens at this size, for dynamic shifting."""
        _, height, width = self.latent_shape
        return (height // self.patch) * (width // self.patch)

    def network_time(self, t: Tensor) -> Tensor:
        """A thousandth of what the pipeline calls the timestep: t, for its num_train_timesteps of 1000."""
        return t * (self.times.train_steps / 1000)

    def clock_of(self, steps: int) -> FlowClock:
        """The clock of a path of ``steps`` steps."""
        del steps
        return self.clock

    def student_times(self, uniform: Sequence[float]) -> tuple[float, ...]:
        return self.clock_of(len(uniform)).times(uniform)

    def teacher_times(self, steps: int) -> Tensor:
        return self.clock_of(steps).path(uniform_times(steps))

    def evenly_to_the_last(self, steps: int) -> Tensor:
        """Times of pipelines that leave them to the Euler scheduler: evenly spaced to its last training time, then shifted.

        A constant shift is in that last time already.
        """
        shortest = 1 / self.times.train_steps
        clock = self.clock_of(steps)
        last, between = shortest if self.times.dynamic else clock.times([shortest])[0], max(steps - 1, 1)
        return clock.path([1 - (1 - last) * i / between for i in range(steps)])
