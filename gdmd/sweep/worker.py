"""One run of a sweep in a separate process: ``python -m gdmd.sweep.worker OUT/runs/HASH [PID]``.

PID: the sweep that started it; when that process is gone, the run saves its state and exits.
Reads job.json, trains (or resumes) run/, evaluates, and writes result.json last. The run of an export trains nothing: it
exports another run and measures what diffusers draws. Exit codes are those of ``gdmd``:
0 done, 2 bad input, 3 not finite, 130 and 143 stopped with a checkpoint.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gdmd.config.model import DiffusersModel
from gdmd.config.run import ModelConfig, RunConfig
from gdmd.diffusion.generate import Sampler, teacher_sampler
from gdmd.io import finite_or_none, read_json, write_atomic
from gdmd.methods.pass_counter import BACKWARD, FROZEN_BACKWARD, CountedMethod
from gdmd.models.loading import family_of, local_or_hub_index
from gdmd.recipes.build import Components, build
from gdmd.recipes.open_run import load_ema, student_row
from gdmd.runs import checkpoint
from gdmd.runs.process import folder_lock, stop_with_parent
from gdmd.runs.run_folder import Run, check_same_config, commit, create, open_run, read_metrics, versions
from gdmd.runs.trained_on import note_start, trained_on
from gdmd.shapes.evaluate import Evaluation, evaluate, evaluate_images
from gdmd.shapes.roles import ShapesRoles, ShapesTextEncoder
from gdmd.sweep.budgets import iterations
from gdmd.sweep.diagnosis import all_scorers, diagnose
from gdmd.sweep.exported import draw_exported
from gdmd.training.loop import Hooks, TrainEnd, train
from gdmd.training.progress import PlainProgress
from gdmd.training.role_state import NonFiniteError

BAD_INPUT, NOT_FINITE = 2, 3
KEPT = ("weight/", "reward/", "histogram/", "latent/", "gap/")
"""Training statistics that go into the table, by the prefix of their key."""


def main(folder: Path, parent: int | None = None) -> int:
    """Finish the run of a folder; returns the exit code. parent: exit when this process is gone."""
    if parent is not None:
        stop_with_parent(parent)
    torch.set_num_threads(1)
    with folder_lock(folder / "lock"):  # a worker whose sweep was killed may still be saving
        if (folder / "result.json").exists():
            return 0
        try:
            job = read_json(folder / "job.json", "Start gdmd sweep again to write it.")
            result = _result(job, folder)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return NOT_FINITE if isinstance(error, NonFiniteError) else BAD_INPUT
        if isinstance(result, TrainEnd):
            return result.exit_code
        write_atomic(folder / "result.json", json.dumps(finite_or_none(result), indent=1), "the run's result")
        return 0


def _result(job: Mapping[str, Any], folder: Path) -> dict[str, Any] | TrainEnd:
    """The measurements of a teacher, an exported student, or a student, which is trained first."""
    if "teacher" in job:
        return _teacher(job)
    return _exported(job, folder) if "exported" in job else _student(job, folder)


def settings(job: Mapping[str, Any], steps: int, runs: Path) -> RunConfig:
    """The config of a run: checkpoints at the diagnosed points (all are kept), otherwise ten (two are kept).

    runs: the folder of all runs, where a second stage finds its first.
    """
    points = job["diagnosis"]["points"] if job["diagnosis"] else 10
    kept = 0 if job["diagnosis"] else 2
    own: dict[str, Any] = {"steps": steps, "checkpoint_every": max(1, steps // points), "keep_checkpoints": kept}
    if "first_stage" in job:
        own["start_from"] = str(runs.resolve() / job["first_stage"] / "run")
    return RunConfig.model_validate({**job["recipe"], "loop": {**job["recipe"]["loop"], **own}})


def teacher_config(job: Mapping[str, Any]) -> RunConfig:
    """A config with the networks and the evaluation of a teacher's run."""
    return RunConfig.model_validate({**job["recipe"], "name": "teacher", "loop": {}})


def run_sampler(job: Mapping[str, Any], folder: Path) -> tuple[Components, Sampler]:
    """What a finished run samples with: its EMA student, or the teacher."""
    if "teacher" in job:
        components = build(teacher_config(job))
        return components, teacher_sampler(components, job["teacher"]["steps"], job["teacher"]["guidance"])
    run = open_run(folder / "run")
    cfg = RunConfig.model_validate(run.config)
    components = build(cfg)
    _load(components, run)
    return components, student_row(cfg, components)


def _teacher(job: Mapping[str, Any]) -> dict[str, Any]:
    cfg, began = teacher_config(job), time.perf_counter()
    components = build(cfg)
    sampler = teacher_sampler(components, job["teacher"]["steps"], job["teacher"]["guidance"])
    measured = measures(cfg, components, sampler, job["split"], ())
    costs = {"student_updates": 0, "steps": 0, "passes": 0, "seconds": 0.0, "peak_memory_mib": memory_mib()}
    return measured | costs | pipeline_facts(cfg, "teacher", job["teacher"]["steps"]) | _facts(cfg, began)


def _student(job: Mapping[str, Any], folder: Path) -> dict[str, Any] | TrainEnd:
    """Train, evaluate, diagnose the checkpoints; a ``TrainEnd`` if a signal stopped the training."""
    began = time.perf_counter()
    cfg = settings(job, iterations(job), folder.parent)
    run = _run(folder / "run", cfg)
    note_start(cfg, run.path)
    components = build(cfg)
    method = counted(components)
    progress = PlainProgress(cfg.loop.steps)
    end = train(method, components.roles, components.stream, cfg.loop, run, Hooks(progress))
    if end.signal is not None:
        return end
    cost = {
        "student_updates": method.cost.updates,
        "steps": end.step,
        "passes": method.cost.passes,
        "seconds": round(method.cost.seconds, 2),
        "peak_memory_mib": memory_mib(),
    }
    _load(components, run)
    measured = measures(cfg, components, student_row(cfg, components), job["split"], trained_on(cfg, run.path))
    points = diagnose(cfg, run, job["diagnosis"], job["split"]) if job["diagnosis"] else []
    for step in checkpoint.steps(run.checkpoints)[:-1]:
        _remove(run.checkpoints / f"step_{step:06d}")
    found = measured | cost | {"statistics": statistics_of(run), "points": points}
    return found | pipeline_facts(cfg, mode_of(cfg.model), len(cfg.method.student_steps)) | _facts(cfg, began)


def _exported(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    began, steps = time.perf_counter(), len(job["recipe"]["method"]["student_steps"])
    run = folder.parent / job["exported"] / "run"
    cfg = RunConfig.model_validate(open_run(run).config)
    images = draw_exported(cfg, run, folder, job["split"])
    encoder = ShapesTextEncoder()  # scorers read the text itself
    found = evaluate_images("exported LoRA", images, encoder, cfg.eval, all_scorers(cfg), job["split"], steps)
    costs = {"student_updates": 0, "steps": 0, "passes": 0, "seconds": 0.0, "peak_memory_mib": memory_mib()}
    return (
        measured_line(found, trained_on(cfg, run)) | costs | pipeline_facts(cfg, "exported", steps) | _facts(cfg, began)
    )


def counted(components: Components) -> CountedMethod:
    """The method with its passes counted; a backward through a frozen base model and a call for features cost less."""
    roles = components.roles
    if isinstance(roles, ShapesRoles):
        return CountedMethod(components.method, [roles.student.net, roles.fake.net, roles.teacher.net, roles.old.net])
    frozen = roles.backbone_nets()
    method = CountedMethod(
        components.method,
        share=lambda: roles.family.feature_cost if roles.fake.in_feature_mode else 1,
        backward=lambda net: FROZEN_BACKWARD if net in frozen else BACKWARD,
    )
    roles.watch(method.watch)
    return method


def mode_of(model: ModelConfig) -> str:
    """How the student is trained: "lora" or "full"."""
    return "lora" if isinstance(model, DiffusersModel) and model.full in ("none", "fake") else "full"


def pipeline_facts(cfg: RunConfig, mode: str, steps: int) -> dict[str, Any]:
    """Facts in the table line of a pipeline: family, method, mode, steps of the sampler. {} for other models.

    There, "gdmd" means ``kind: gdmd_tilted``, and ``kind: gdmd`` is "algorithm_1".
    """
    if not isinstance(cfg.model, DiffusersModel):
        return {}
    family = family_of(local_or_hub_index(cfg.model), cfg.model).name
    method: str = cfg.method.kind
    if mode == "teacher":
        method = "teacher"
    elif method.startswith("gdmd") and not cfg.method.rewarded:
        method = "dmd"
    elif method == "gdmd":
        method = "algorithm_1"
    elif method == "gdmd_tilted":  # a control, such as gdmd_tilted_shuffled, keeps its name: no goal is about it
        method = "gdmd"
    return {"pipeline": {"family": family, "method": method, "mode": mode, "steps": steps}}


def measures(
    cfg: RunConfig, components: Components, sampler: Sampler, split: Any, trained: Sequence[str]
) -> dict[str, Any]:
    """The measured part of a table line; ``shapeseval`` is the overall score, ``tasks`` holds one for each task."""
    return measured_line(evaluate(sampler, components, cfg.eval, all_scorers(cfg), split), trained)


def measured_line(found: Evaluation, trained: Sequence[str]) -> dict[str, Any]:
    """The part of a table line that comes from an evaluation.

    correct: 1 or 0 for every image, caption by caption. trained: ``trained_on`` of its student.
    """
    row = found.json()
    tasks = dict(row.pop("shapeseval"))
    correct = "".join(str(int(right)) for right in found.correct.tolist())
    return {"shapeseval": tasks.pop("overall"), "tasks": tasks, **row, "correct": correct, "trained": list(trained)}


def statistics_of(run: Run) -> dict[str, float]:
    """Means over the second half of training of what the method logged about rewards and weights."""
    rows = read_metrics(run.path)
    late = rows[len(rows) // 2 :]
    keys = [key for key in dict.fromkeys(key for row in late for key in row) if key.startswith(KEPT)]
    found = {key: [row[key] for row in late if key in row and row[key] == row[key]] for key in keys}
    return {key: sum(values) / len(values) for key, values in found.items() if values}


def memory_mib() -> float:
    """Peak memory of the GPU, or of this process if there is none."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _facts(cfg: RunConfig, began: float) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    whole = round(time.perf_counter() - began, 1)
    return {"cell_seconds": whole, "device": device, "commit": commit(), "torch": versions()["torch"]}


def _run(path: Path, cfg: RunConfig) -> Run:
    """The run folder, new or as a killed worker left it."""
    if (path / "config.yaml").exists():
        run = open_run(path)
        before = RunConfig.model_validate(run.config).model_dump(mode="json")
        # start_from follows from the first stage, and moves with the folder of the sweep
        check_same_config(Run(path, before), cfg.model_dump(mode="json"), ["loop.start_from"])
        return run
    return create(path, cfg.model_dump(mode="json"), sys.argv)


def _load(components: Components, run: Run) -> None:
    """The EMA of the last step; RunError if that checkpoint is damaged (an older one would be another student)."""
    saved = checkpoint.load_chosen(run.checkpoints, str(run.config["loop"]["steps"]))
    assert saved is not None
    load_ema(components, saved)


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:3])))
