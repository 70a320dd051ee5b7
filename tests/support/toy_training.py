"""The smallest distillation: linear student and fake score on vectors. Also a program, for tests that kill it:

python toy_training.py RUN_FOLDER STEPS SECONDS_PER_STEP
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdmd.config.training import LoopConfig
from gdmd.diffusion.guidance import plain
from gdmd.diffusion.rng import SampleRng
from gdmd.diffusion.schedule import FlowSchedule
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run, read_metrics
from gdmd.training.loop import Hooks, TrainEnd, train
from gdmd.types import Loss, Prediction, PromptBatch, Role, Update

SIZE = 6
TIMED = "speed/images_per_s"


def untimed_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run without their speed: equal for runs that trained equally."""
    return [{key: value for key, value in row.items() if key != TIMED} for row in read_metrics(run)]


def student_weights(run: Path) -> dict[str, Tensor]:
    """The student's weights in the newest checkpoint."""
    saved = checkpoint.load_newest(run / "checkpoints")
    assert saved is not None
    return dict(saved.part("student"))


def full_disk(*_: object, **__: object) -> None:
    """In place of a function that writes."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only_disk(*_: object, **__: object) -> None:
    """In place of a function that writes."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def signal_at(step: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    """A function of the step that sends this process a signal in iteration ``step``."""
    return lambda now: os.kill(os.getpid(), number) if now == step else None


class ToyDenoiser(nn.Module):
    """x0 = layers(x_t); two layers, so that their order and names matter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        x0 = self.layers(x_t)
        return Prediction(x0, x_t - x0)


class ToyRoles:
    schedule = FlowSchedule()
    guide = staticmethod(plain)

    def __init__(self) -> None:
        self.student, self.fake, self.teacher, self.old = (ToyDenoiser(seed) for seed in (1, 1, 2, 1))
        self._followed = False

    def parameters(self, role: Role) -> Mapping[str, nn.Parameter]:
        return dict((self.student if role == "student" else self.fake).named_parameters())

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        self._followed = True
        for old, new in zip(self.old.parameters(), self.student.parameters(), strict=True):
            old.lerp_(new, 1 - decay)

    def old_state(self) -> Mapping[str, Tensor]:
        return dict(self.old.named_parameters()) if self._followed else {}

    def shard(self, shard: Callable[[nn.Module], None]) -> None:
        for net in (self.student, self.fake, self.old):
            shard(net)

    def load_old_state(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            self._followed = True
            self.old.load_state_dict(dict(tensors))


@dataclass(frozen=True)
class ToyBatch:
    x_t: Tensor  # [B, SIZE]
    x_tar: Tensor  # [B, SIZE]
    t: Tensor  # [B]


@dataclass
class ToyMethod:
    """Two fake updates, two student updates, an old policy that follows, a running scale that a resume restores."""

    roles: ToyRoles
    scale: Tensor = field(default_factory=lambda: torch.zeros(()))
    poison: Callable[[int, Role, Tensor], Tensor] | None = None
    step: int = 0

    def iteration(self, step: int, prompts: PromptBatch, rng: SampleRng) -> Iterator[Update]:
        self.step = step
        x_t = rng.normal("noise", (SIZE,))  # [B, SIZE]
        t = torch.ones(len(prompts))
        with torch.no_grad():
            x0 = self.roles.student(x_t, t, {}).x0
            x_old = self.roles.old(x_t, t, {}).x0
        for i in range(2):
            yield Update("fake", self.fake_loss, ToyBatch(rng.normal("fake", (SIZE,), i), x0, t))
        with torch.no_grad():
            grad = self.roles.fake(x_t, t, {}).x0 - self.roles.teacher(x_t, t, {}).x0
        self.scale = 0.9 * self.scale + 0.1 * prompts.ranks.all_gather(grad).std()  # of all ranks
        for _ in range(2):
            yield Update("student", self.student_loss, ToyBatch(x_t, x_old - grad / (1 + self.scale), t))
        self.roles.follow(0.9)

    def fake_loss(self, batch: ToyBatch) -> Loss:
        return self._loss("fake", self.roles.fake(batch.x_t + batch.x_tar, batch.t, {}).x0, batch)

    def student_loss(self, batch: ToyBatch) -> Loss:
        return self._loss("student", self.roles.student(batch.x_t, batch.t, {}).x0, batch)

    def _loss(self, role: Role, x0: Tensor, batch: ToyBatch) -> Loss:
        per_sample = (x0 - batch.x_tar).square().mean(1)  # [b]
        if self.poison is not None:
            per_sample = self.poison(self.step, role, per_sample)
        return Loss(per_sample, {f"size/{role}": x0.detach().abs().mean(1)})

    def stats(self) -> Mapping[str, Tensor]:
        return {"scale/grad": self.scale}

    def state(self) -> Mapping[str, Tensor]:
        return {"scale": self.scale}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.scale = state["scale"]


@dataclass
class ToyStream:
    """Only indices; ``at_step`` is called before each step."""

    batch_size: int
    at_step: Callable[[int], None] = lambda step: None

    def at(self, step: int, start: int = 0, stop: int | None = None) -> PromptBatch:
        self.at_step(step)
        index = torch.arange(self.batch_size)[start:stop]
        return PromptBatch(index, ("a",) * len(index), index, {}, {})


def toy_config(steps: int = 40, **changes: Any) -> LoopConfig:
    fixed = {"batch_size": 8, "lr_student": 1e-2, "lr_fake": 2e-2, "lr_schedule": "cosine", "warmup": 6, "seed": 3}
    pace = {"checkpoint_every": 5, "log_every": 1, "threads": 1}
    return LoopConfig(**({"steps": steps} | fixed | pace | changes))


@dataclass
class Toy:
    """One toy run and its objects."""

    folder: Path
    cfg: LoopConfig
    at_step: Callable[[int], None] = lambda step: None
    hooks: Hooks = field(default_factory=Hooks)
    poison: Callable[[int, Role, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.roles = ToyRoles()
        self.method = ToyMethod(self.roles, poison=self.poison)

    def train(self) -> TrainEnd:
        exists = (self.folder / "config.yaml").exists()
        run = open_run(self.folder) if exists else create(self.folder, self.cfg.model_dump(mode="json"))
        stream = ToyStream(self.cfg.batch_size, self.at_step)
        return train(self.method, self.roles, stream, self.cfg, run, self.hooks)


if __name__ == "__main__":
    seconds = float(sys.argv[3])
    Toy(Path(sys.argv[1]), toy_config(int(sys.argv[2])), lambda step: time.sleep(seconds)).train()
