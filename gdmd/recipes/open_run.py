"""From a run folder, or the teacher's name, to something that generates images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gdmd.config.describe import SHORT_NAMES
from gdmd.config.methods.dmd import DMDConfig
from gdmd.config.run import PromptConfig, RunConfig
from gdmd.config.training import LoopConfig
from gdmd.config.validation import ValidationConfig
from gdmd.data.prompts import SHIPPED
from gdmd.diffusion.generate import BATCH, Sampler, student_sampler, teacher_sampler
from gdmd.io import RunError, typed
from gdmd.recipes.build import Components, build
from gdmd.recipes.inputs import on_base
from gdmd.recipes.run_folders import TEACHERS, config_of
from gdmd.runs import checkpoint
from gdmd.training.ema import load_named

FEW_STEPS = 4
"""Steps of the teacher's plain few-step row."""
SAMPLING = ("student_steps", "student_sampler", "guidance")
"""Fields of a method that say how images are generated."""


def open_student(
    cfg: RunConfig, folder: Path, which: str = "last", device: str | None = None
) -> tuple[Components, int]:
    """The components of a run with the EMA weights of a checkpoint (best, last or a step) in its student, and its step."""
    saved = checkpoint.load_chosen(folder / "checkpoints", which)
    if saved is None:
        raise _no_checkpoint(folder)
    components = build(_sampling_only(cfg), device)
    load_ema(components, saved)
    return components, saved.step


def check_checkpoint(folder: Path, which: str) -> None:
    """RunError for a run without this checkpoint; nothing is loaded."""
    if which != "last":
        checkpoint.chosen_path(folder / "checkpoints", which)
    elif not checkpoint.steps(folder / "checkpoints"):
        raise _no_checkpoint(folder)


def _no_checkpoint(folder: Path) -> RunError:
    return RunError(f"{folder} has no checkpoint yet. Train it first: gdmd train --resume {typed(folder)}.")


def _sampling_only(cfg: RunConfig) -> RunConfig:
    """The part of a real model's run that generates images: no rewards, prompts, real images or fake score."""
    if cfg.model.kind == "shapes":
        return cfg
    full: Literal["none", "student"] = "student" if cfg.model.full in ("student", "both") else "none"
    parts = {
        "model": cfg.model.model_copy(update={"full": full}),
        "method": DMDConfig(**{name: getattr(cfg.method, name) for name in SAMPLING}),
        "prompts": PromptConfig(file=next(iter(SHIPPED))),  # required, but none of them is used
    }
    return cfg.model_copy(update=parts | {"rewards": (), "real_data": None, "validation": ValidationConfig(every=0)})


def load_ema(components: Components, saved: checkpoint.Checkpoint) -> None:
    """Put the averaged student (the plain one of a run without EMA) into ``components.roles.student``."""
    load_named(components.roles.parameters("student"), saved.part("ema") or saved.part("student"), "the student")


def open_named(
    what: str, which: str = "last", base: str | None = None, device: str | None = None
) -> tuple[RunConfig, Components, Sampler, int]:
    """A run folder or one of TEACHERS as a sampler; and the step of the student (else 0).

    ``base``: the base model of a run, if it has moved.
    """
    if what in TEACHERS:
        cfg = RunConfig(name="teacher", loop=LoopConfig())
        components = build(cfg, device)
        return cfg, components, teacher_row(cfg, components, what), 0
    cfg = config_of(Path(what))
    if cfg.model.kind == "diffusers":
        cfg = on_base(cfg, Path(what), base, f"{what},base=FOLDER")
    elif base:
        raise ValueError(
            f"{what},base={base}: a run of the Shapes world has its base model in the package; leave it out"
        )
    components, step = open_student(cfg, Path(what), which, device)
    return cfg, components, student_row(cfg, components), step


def teacher_row(cfg: RunConfig, components: Components, what: str) -> Sampler:
    """The teacher: guided in eval.teacher_steps steps, guided in four, and four plain steps (4 NFE, as a student)."""
    steps = cfg.eval.teacher_steps if what == "teacher" else FEW_STEPS
    if what == "teacher-4-plain":
        return teacher_sampler(components, steps, 1.0, f"teacher, {steps} plain steps")
    return teacher_sampler(components, steps, cfg.method.guidance, f"teacher, {steps} steps")


def student_row(cfg: RunConfig, components: Components, name: str = "") -> Sampler:
    """The few-step student as it is now."""
    steps = components.student_steps or cfg.method.student_steps
    label = name or SHORT_NAMES[cfg.method.kind]
    name = f"{label}, {len(steps)} steps"
    return student_sampler(components, components.roles.student, steps, name, cfg.method.student_sampler)


def image_batch(cfg: RunConfig) -> int:
    """Images per sampling call: what fits in training, for real models."""
    return BATCH if cfg.shapes_world else cfg.loop.micro_batch or cfg.loop.batch_size
