"""What ``gdmd eval run`` and ``gdmd report`` do: a run's EMA student, or the teacher, on a fixed prompt set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gdmd.config.run import RunConfig
from gdmd.diffusion.generate import WARM_UP, Sampler
from gdmd.diffusion.rng import SampleRng
from gdmd.evaluation.run_report import read_rows, report_run, save_rows
from gdmd.evaluation.validation import grid_captions
from gdmd.evaluation.verdict import PER_IMAGE, per_image
from gdmd.io import content_hash, typed
from gdmd.recipes.build import Components
from gdmd.recipes.build_rewards import scorer_specs, scorers_of
from gdmd.recipes.contents import base_content, checkpoint_content
from gdmd.recipes.open_run import SAMPLING, load_ema, open_named, open_student, student_row, teacher_row
from gdmd.recipes.reward_identity import scorer_identity
from gdmd.recipes.run_folders import TEACHERS, config_of, require_shapes
from gdmd.reporting.progress_bar import progress_bar
from gdmd.runs import checkpoint
from gdmd.shapes.evaluate import evaluate
from gdmd.shapes.grammar import TASKS, Split, catalog, fixed_rows
from gdmd.shapes.same_noise import PER_CAPTION, SameNoise, write_same_noise

Row = Mapping[str, Any]
"""``Evaluation.json()``, which images are correct and, for a student, the "step" of its checkpoint."""
_VERSION = "2"
"""Version of a row; rows of an earlier version are measured again."""


def evaluation_captions(cfg: RunConfig) -> tuple[str, ...]:
    """The captions of the evaluation of a run on the Shapes world, and of its comparison; none for a real model."""
    return (*grid_captions(), *catalog().texts(fixed_rows("eval", cfg.eval.per_task))) if cfg.shapes_world else ()


def row_key(cfg: RunConfig, sampler: Sampler, weights: str = "") -> str:
    """A hash of everything that a row depends on. weights: ``checkpoint_content`` of a student."""
    settings = (sampler.name, *(getattr(cfg.method, name) for name in SAMPLING), cfg.eval.model_dump(mode="json"))
    scorers = [scorer_identity(spec) for spec in scorer_specs(cfg)]
    return content_hash(_VERSION, json.dumps(settings), base_content(cfg.model), weights, *scorers)


def measure(cfg: RunConfig, components: Components, sampler: Sampler, split: Split = "eval", step: int = 0) -> Row:
    """One row of a table: the sampler on the fixed prompt set, at the size that the recipe names."""
    size = cfg.eval
    count = len(TASKS) * size.per_task * size.images
    what = f"measuring {sampler.name} on {count:,} images"
    with progress_bar(what, count, then="scoring") as advance:
        found = evaluate(_counting(sampler, advance, min(WARM_UP, count)), components, size, scorers_of(cfg), split)
    rows = fixed_rows(split, size.per_task)
    tasks, captions = [TASKS[int(catalog().task[row])] for row in rows], catalog().texts(rows)
    row = found.json() | {PER_IMAGE: per_image(found.correct.tolist(), tasks, captions, size.images, split, size.seed)}
    return row | ({"step": step} if step else {})


def _counting(sampler: Sampler, advance: Callable[[int], None], warm_up: int = 0) -> Sampler:
    """The same sampler; it tells ``advance`` how many images it has drawn after the ``warm_up``."""
    drawn = -warm_up

    def latents(texts: Sequence[str], rng: SampleRng) -> Tensor:
        nonlocal drawn
        found = sampler.latents(texts, rng)
        drawn += len(texts)
        if drawn > 0:
            advance(len(texts))
        return found

    return replace(sampler, latents=latents)


def measure_named(
    what: str, split: Split, overrides: Mapping[str, int | None], which: str = "last", device: str | None = None
) -> tuple[str, Row, RunConfig]:
    """(name of the row, row, configuration) of a run's EMA student or of the teacher.

    overrides: fields of EvalConfig; None keeps the recipe's value.
    """
    if what not in TEACHERS:
        require_shapes(config_of(Path(what)), what)
    cfg, components, sampler, step = open_named(what, which, device=device)
    own = cfg.eval.model_copy(update={key: value for key, value in overrides.items() if value is not None})
    cfg = cfg.model_copy(update={"eval": own})
    return sampler.name, measure(cfg, components, sampler, split, step), cfg


def finish_run(cfg: RunConfig, folder: Path, components: Components, step: int) -> tuple[Row, Path]:
    """After training: measure the EMA student, compare it with the teacher from the same noise, write report.html."""
    load_student(components, folder, step)
    student = student_row(cfg, components)
    key = row_key(cfg, student, checkpoint_content(folder, step))
    row = measure(cfg, components, student, step=step)
    teachers = {sampler.name: sampler for sampler in (teacher_row(cfg, components, what) for what in TEACHERS)}
    known = {name: found for name, found in read_rows(folder).items() if name in teachers}
    current = {name: found for name, found in known.items() if found.get("key") == row_key(cfg, teachers[name])}
    save_rows(folder, current | {student.name: dict(row) | {"key": key}})  # rows of other settings are left out
    compare(folder / "grids", cfg, components, (teacher_row(cfg, components, "teacher"), student))
    return row, report_run(folder)


def load_student(components: Components, folder: Path, step: int) -> None:
    """Load the EMA student of this step of a run. RunError if its checkpoint is damaged."""
    saved = checkpoint.load_chosen(folder / "checkpoints", str(step))
    assert saved is not None
    load_ema(components, saved)


def compare(folder: Path, cfg: RunConfig, components: Components, samplers: Sequence[Sampler]) -> SameNoise:
    """comparison.png and comparison.json in ``folder``: the samplers next to each other from the same noise."""
    captions = grid_captions()
    with progress_bar(
        "sampling every model from the same noise", len(samplers) * PER_CAPTION * len(captions)
    ) as advance:
        counting = [(_counting(sampler, advance), components) for sampler in samplers]
        return write_same_noise(folder / "comparison.png", counting, captions, cfg.eval.seed)


def report_of(cfg: RunConfig, folder: Path, *, fresh: bool, device: str | None = None) -> Path:
    """Measure the missing rows of teacher and student, then write the page.

    A real model is not loaded: its page shows the stored results. ValueError for ``fresh`` with a real model.
    """
    if not cfg.shapes_world:
        if fresh:
            raise ValueError(
                f"--fresh measures ShapesEval again, but {folder} was not trained on Shapes captions; leave it out, and "
                f"score the run with: gdmd eval preference {typed(folder)} --prompts FILE"
            )
        return report_run(folder)
    components, step = open_student(cfg, folder, device=device)
    rows = {} if fresh else dict(read_rows(folder))
    student = student_row(cfg, components)
    rows_in_order = (*(teacher_row(cfg, components, what) for what in TEACHERS), student)
    samplers = tuple({sampler.name: sampler for sampler in rows_in_order}.values())  # eval.teacher_steps may be 4
    for sampler in samplers:
        own = sampler is student
        key = row_key(cfg, sampler, checkpoint_content(folder, step) if own else "")
        if rows.get(sampler.name, {}).get("key") != key:
            rows[sampler.name] = dict(measure(cfg, components, sampler, step=step if own else 0)) | {"key": key}
    save_rows(folder, {sampler.name: rows[sampler.name] for sampler in samplers})
    compare(folder / "grids", cfg, components, samplers)
    return report_run(folder)
