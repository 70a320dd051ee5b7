"""What ``gdmd eval`` and ``gdmd report`` do: a run's EMA student, or the teacher, on a fixed prompt set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from gdmd.config.loop import LoopConfig
from gdmd.config.method import DmdConfig
from gdmd.config.run import PromptConfig, RewardConfig, RunConfig, ShapesReward
from gdmd.data.prompts import SHIPPED
from gdmd.evaluation.grids import write_comparison, write_grid
from gdmd.evaluation.report import read_rows, report_run, save_rows
from gdmd.evaluation.sample import BATCH, Sampler, images_of, student_sampler, teacher_sampler
from gdmd.evaluation.shapes import evaluate
from gdmd.io import RunError, content_hash, typed
from gdmd.programs.contents import base_content, checkpoint_content
from gdmd.programs.folders import TEACHERS, config_of, require_shapes
from gdmd.programs.inputs import on_base
from gdmd.programs.scorers import SHAPES_KINDS, scorer_identity
from gdmd.recipes.build import Lab, build, build_rewards
from gdmd.runs import checkpoint
from gdmd.shapes.grammar import Split, catalogue, fixed_rows
from gdmd.training.ema import load_named
from gdmd.types import Reward

FEW_STEPS = 4
"""Steps of the teacher's plain few-step row."""
GRID_COLUMNS = 6
REAL_ROWS = 3
"""Rows and columns of a real model's grid: its images are large."""
Row = Mapping[str, Any]
"""``Evaluation.json()``, and for a student the "step" of its checkpoint."""


def open_student(cfg: RunConfig, folder: Path, which: str = "last") -> tuple[Lab, int]:
    """The lab of a run whose student holds the EMA weights of a checkpoint (best, last or a step), and its step."""
    saved = checkpoint.load_chosen(folder / "checkpoints", which)
    if saved is None:
        raise RunError(f"{folder} has no checkpoint yet. Train it first: gdmd train --resume {typed(folder)}.")
    lab = build(_drawing(cfg))
    load_ema(lab, saved)
    return lab, saved.step


def _drawing(cfg: RunConfig) -> RunConfig:
    """What makes the images of a real model's student: no rewards, prompts, real images or fake of the training."""
    if cfg.model.kind == "shapes":
        return cfg
    full: Literal["none", "student"] = "student" if cfg.model.full in ("student", "both") else "none"
    parts = {
        "model": cfg.model.model_copy(update={"full": full}),
        "method": DmdConfig(student_steps=cfg.method.student_steps),
        "prompts": PromptConfig(file=next(iter(SHIPPED))),  # a lab has some; none of them is drawn
    }
    return cfg.model_copy(update=parts | {"rewards": (), "real_data": None})


def load_ema(lab: Lab, saved: checkpoint.Checkpoint) -> None:
    """Put the averaged student (the plain one of a run without EMA) into ``lab.roles.student``."""
    load_named(lab.roles.parameters("student"), saved.part("ema") or saved.part("student"), "the student")


def open_named(what: str, which: str = "last", base: str | None = None) -> tuple[RunConfig, Lab, Sampler, int]:
    """A run folder or one of TEACHERS as something that makes images; and the step of the student (else 0).

    ``base``: the base model of a run, where it has moved.
    """
    if what in TEACHERS:
        cfg = RunConfig(name="teacher", loop=LoopConfig())
        lab = build(cfg)
        return cfg, lab, teacher_row(cfg, lab, what), 0
    cfg = config_of(Path(what))
    if cfg.model.kind == "diffusers":
        cfg = on_base(cfg, Path(what), base, f"{what},base=FOLDER")
    elif base:
        raise ValueError(
            f"{what},base={base}: a run of the Shapes world has its base model in the package; leave it out"
        )
    lab, step = open_student(cfg, Path(what), which)
    return cfg, lab, student_row(cfg, lab), step


def teacher_row(cfg: RunConfig, lab: Lab, what: str) -> Sampler:
    """The teacher: guided in eval.teacher_steps steps, guided in four, and four plain steps (a student's 4 calls)."""
    steps = cfg.eval.teacher_steps if what == "teacher" else FEW_STEPS
    if what == "teacher-4-plain":
        return teacher_sampler(lab, steps, 1.0, f"teacher, {steps} plain steps")
    return teacher_sampler(lab, steps, cfg.method.guidance, f"teacher, {steps} steps")


def student_row(cfg: RunConfig, lab: Lab, name: str = "") -> Sampler:
    """The few-step student as it is now."""
    steps = lab.student_steps or cfg.method.student_steps
    return student_sampler(lab, lab.roles.student, steps, f"{name or cfg.method.kind.upper()}, {len(steps)} steps")


def grid_captions(per_task: int = 2) -> tuple[str, ...]:
    """The captions of the sample grids, from every task of the evaluation set."""
    return tuple(catalogue().captions[row].text for row in fixed_rows("eval", per_task).tolist())


def image_batch(cfg: RunConfig) -> int:
    """Images per sampling call: what fits in training, for real models."""
    return BATCH if cfg.model.kind == "shapes" else cfg.loop.micro_batch or cfg.loop.batch_size


def grid_hook(lab: Lab, cfg: RunConfig) -> Callable[[int, Path | None], None]:
    """Draws the grid of a step: the same captions from the same noise every time. No path: nothing is written."""
    shapes = cfg.model.kind == "shapes"
    captions = grid_captions() if shapes else tuple(lab.stream.groups[0][:REAL_ROWS])
    columns = GRID_COLUMNS if shapes else REAL_ROWS
    texts = [text for text in captions for _ in range(columns)]

    def grid(step: int, path: Path | None) -> None:
        cells = images_of(student_row(cfg, lab), lab, texts, cfg.eval.seed, image_batch(cfg))
        if path is not None:
            write_grid(path, cells.unflatten(0, (len(captions), columns)), captions, scale=3 if shapes else 1)

    return grid


def scorers_of(cfg: RunConfig) -> tuple[Reward, ...]:
    """The rewards of the recipe, then the shipped scorers that it does not train on; the held-out one is last."""
    return build_rewards(_scorer_specs(cfg))


def _scorer_specs(cfg: RunConfig) -> list[RewardConfig]:
    own = {spec.kind: spec for spec in cfg.rewards}
    return [own.get(kind, ShapesReward(kind=kind)) for kind in SHAPES_KINDS]


def row_key(cfg: RunConfig, sampler: Sampler, weights: str = "") -> str:
    """What a row of the report depends on. weights: ``checkpoint_content`` of a student."""
    settings = (sampler.name, cfg.method.student_steps, cfg.method.guidance, cfg.eval.model_dump(mode="json"))
    scorers = [scorer_identity(spec) for spec in _scorer_specs(cfg)]
    return content_hash(json.dumps(settings), base_content(cfg.model), weights, *scorers)


def measure(cfg: RunConfig, lab: Lab, sampler: Sampler, split: Split = "eval", step: int = 0) -> Row:
    """One row of a table: the sampler on the fixed prompt set of the recipe's size."""
    row = evaluate(sampler, lab, cfg.eval, scorers_of(cfg), split).json()
    return row | ({"step": step} if step else {})


def measure_named(
    what: str, split: Split, given: Mapping[str, int | None], which: str = "last"
) -> tuple[str, Row, RunConfig]:
    """``gdmd eval``: (name of the row, row, configuration) of a run's EMA student or of the teacher.

    ``given``: fields of EvalConfig in the place of the recipe's, None where that holds.
    """
    if what not in TEACHERS:
        require_shapes(config_of(Path(what)), what)
    cfg, lab, sampler, step = open_named(what, which)
    own = cfg.eval.model_copy(update={key: value for key, value in given.items() if value is not None})
    cfg = cfg.model_copy(update={"eval": own})
    return sampler.name, measure(cfg, lab, sampler, split, step), cfg


def finish_run(cfg: RunConfig, folder: Path, lab: Lab, step: int) -> tuple[Row, Path]:
    """After training: measure the EMA student, compare it with the teacher from the same noise, write report.html."""
    saved = checkpoint.load_chosen(folder / "checkpoints", str(step))
    assert saved is not None
    load_ema(lab, saved)
    student = student_row(cfg, lab)
    key = row_key(cfg, student, checkpoint_content(folder, step))
    row = measure(cfg, lab, student, step=step)
    save_rows(folder, dict(read_rows(folder)) | {student.name: dict(row) | {"key": key}})
    compare(folder, cfg, lab, (teacher_row(cfg, lab, "teacher"), student))
    return row, report_run(folder)


def compare(folder: Path, cfg: RunConfig, lab: Lab, samplers: tuple[Sampler, ...]) -> None:
    """grids/comparison.png: the samplers side by side from the same noise."""
    write_comparison(folder / "grids" / "comparison.png", samplers, lab, grid_captions(), cfg.eval.seed)


def report_of(cfg: RunConfig, folder: Path, *, fresh: bool) -> Path:
    """``gdmd report``: measure the teacher's rows and the student where they are missing, then write the page.

    A real model is not loaded: its page shows what lies in the folder. ValueError for ``fresh`` there.
    """
    if cfg.model.kind != "shapes":
        if fresh:
            raise ValueError(
                f"--fresh measures ShapesEval again, and {folder} is a run of a real model; leave it out, and score the "
                f"run with: gdmd eval preference {typed(folder)} --prompts FILE"
            )
        return report_run(folder)
    lab, step = open_student(cfg, folder)
    rows = {} if fresh else dict(read_rows(folder))
    student = student_row(cfg, lab)
    rows_in_order = (*(teacher_row(cfg, lab, what) for what in TEACHERS), student)
    samplers = tuple({sampler.name: sampler for sampler in rows_in_order}.values())  # eval.teacher_steps may be 4
    for sampler in samplers:
        own = sampler is student
        key = row_key(cfg, sampler, checkpoint_content(folder, step) if own else "")
        if rows.get(sampler.name, {}).get("key") != key:
            rows[sampler.name] = dict(measure(cfg, lab, sampler, step=step if own else 0)) | {"key": key}
    save_rows(folder, {sampler.name: rows[sampler.name] for sampler in samplers})
    compare(folder, cfg, lab, samplers)
    return report_run(folder)
