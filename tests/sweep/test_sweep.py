"""A comparison as a program: stopped and continued, a failing cell beside good ones, nothing done twice."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gdmd.sweep import worker as compare_job
from gdmd.sweep.cells import plan, read_table
from gdmd.sweep.pool import run_comparison
from gdmd.sweep.spec import read_comparison

ROOT = Path(__file__).resolve().parents[2]
SPEC = """name: tiny
base: shapes_smoke
student_updates: 30
seeds: [3]
overrides: {loop.batch_size: 2, loop.log_every: 1}
rows:
  - {name: gdmd, kind: gdmd}
  - {name: broken, kind: control, overrides: {loop.lr_student: 1.0e+30}}
teachers: [{name: teacher_1, steps: 1, guidance: 1.0}]
evaluation: {per_task: 1, images: 2}
diagnosis: {seeds: 0}
pictures: {rows: [gdmd], per_cluster: 1, captions: 2}
"""
VARYING = {"seconds", "cell_seconds", "images_per_s", "images_per_s_decoded", "peak_memory_mib", "commit"}
"""Times and the state of the checkout; all else must be equal to the last bit."""
LIMIT = 300.0
"""Seconds that a wait may take on a busy machine."""


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """What two calls of the program left: the first was interrupted, the second went on to the end."""

    folder: Path
    spec: Path
    steps_at_stop: list[str]
    stopped: Finished
    ended: Finished

    @property
    def table(self) -> list[dict[str, Any]]:
        return read_table(self.folder / "table.jsonl")


def start(spec: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gdmd", "sweep", str(spec), "--out", str(folder), "--jobs", "3", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=spec.parent
    )


def end(process: subprocess.Popen[str]) -> Finished:
    try:
        out_text, err_text = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return Finished(process.returncode, out_text, err_text)


def gdmd_cell(spec: Path) -> Any:
    return next(cell for cell in plan(read_comparison(str(spec))) if cell.method == "gdmd")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    here = tmp_path_factory.mktemp("compare")
    spec, folder = here / "tiny.yaml", here / "made"
    spec.write_text(SPEC)
    first = start(spec, folder, "--only", "gdmd")
    checkpoints = gdmd_cell(spec).folder(folder) / "run" / "checkpoints"
    until = time.monotonic() + LIMIT
    while not list(checkpoints.glob("step_*")) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    stopped = end(first)
    steps = sorted(path.name for path in checkpoints.glob("step_*"))
    yield World(folder, spec, steps, stopped, end(start(spec, folder, "--json")))


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(world: World) -> None:
    assert world.stopped.code == 130, world.stopped.err
    assert world.steps_at_stop and "step_000015" not in world.steps_at_stop
    assert "the same command goes on" in world.stopped.err and "Traceback" not in world.stopped.err


def test_a_failing_cell_is_reported_and_the_others_are_finished(world: World) -> None:
    assert world.ended.code == 1, world.ended.err
    told = json.loads(world.ended.out)
    assert list(told["failed"]) == ["broken/3/updates"] and "not finite" in told["failed"]["broken/3/updates"]
    assert {line["method"] for line in world.table} == {"gdmd", "teacher_1"}
    assert told["missing"] == 1 and Path(told["page"]).is_file()
    assert {"fig6_grid.png", "fig7_grid.png", "fig3_features.png"} <= {
        p.name for p in (world.folder / "figures").iterdir()
    }


def test_a_stopped_comparison_ends_with_the_table_of_an_uninterrupted_one(world: World, tmp_path: Path) -> None:
    cell = gdmd_cell(world.spec)
    resumed = json.loads((cell.folder(world.folder) / "run" / "run.json").read_text())["resumed"]
    assert len(resumed) == 1 and 0 < resumed[0]["step"] < 15
    folder = cell.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(cell.job))
    assert compare_job.main(folder) == 0
    alone = json.loads((folder / "result.json").read_text())
    line = next(line for line in world.table if line["method"] == "gdmd")
    assert {k: (alone[k], line[k]) for k in alone.keys() - VARYING if alone[k] != line[k]} == {}
    assert line["student_updates"] == 30 and line["steps"] == 15 and line["nfe"] == 4 and line["seed"] == 3
    assert line["passes"] > 15 * 2 * (1 + 2 * 9) and line["trained"] == ["shapes_clip", "shapes_pref"]
    assert line["command"].endswith("--only gdmd/3/updates") and line["hash"] == cell.hash


def test_a_finished_comparison_trains_nothing_again(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*") if "cells" in path.parts}
    table = (world.folder / "table.jsonl").read_text()
    said: list[str] = []
    comparison = read_comparison(str(world.spec))
    outcome = run_comparison(comparison, "tiny.yaml", world.folder, 1, ["gdmd", "teacher_1"], said.append)
    assert (outcome.trained, outcome.cached, outcome.exit_code) == ([], 2, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (world.folder / "table.jsonl").read_text() == table
    assert "2 finished before, 0 to run" in said[0] and len(said) == 1


def test_a_line_lost_in_a_crash_is_added_again(world: World) -> None:
    path = world.folder / "table.jsonl"
    text = path.read_text()
    path.write_text(text[:-30])
    run_comparison(read_comparison(str(world.spec)), "tiny.yaml", world.folder, 1, ["gdmd", "teacher_1"], print)
    assert sorted(path.read_text().splitlines()) == sorted(
        line.replace(f"compare {world.spec}", "compare tiny.yaml") if line in text.splitlines()[-1:] else line
        for line in text.splitlines()
    )


def test_a_finished_cell_can_be_evaluated_like_any_run(world: World) -> None:
    from gdmd.evaluation.runs import measure_named

    _, row, _ = measure_named(str(gdmd_cell(world.spec).folder(world.folder) / "run"), "eval", {})
    line = next(line for line in world.table if line["method"] == "gdmd")
    assert row["shapeseval"]["overall"] == line["shapeseval"] and row["fidelity"] == line["fidelity"]


def test_a_second_stage_begins_with_the_averaged_student_of_its_first(tmp_path: Path) -> None:
    spec = tmp_path / "stages.yaml"
    rows = "  - {name: first, kind: rival, recipe: dmd, student_updates: 3, overrides: {method.fake_updates: 1}}\n"
    rows += "  - {name: gdmd, kind: gdmd, start_from: first}\n"
    text = SPEC.replace("student_updates: 30", "student_updates: 2").replace("diagnosis: {seeds: 0}\n", "")
    text = text[: text.index("  - ")] + rows + text[text.index("teachers:") :]
    spec.write_text(text + "diagnosis: {seeds: 1, points: 1, per_task: 1, images: 2}\n")
    results = {}
    for cell in plan(read_comparison(str(spec)))[1:]:
        folder = cell.folder(tmp_path)
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps(cell.job))
        assert compare_job.main(folder) == 0
        results[cell.method] = json.loads((folder / "result.json").read_text())
    first, second = results["first"], results["gdmd"]
    assert first["student_updates"] == 3 and second["student_updates"] == 2
    at_start = second["points"][0]
    same = {key: at_start[key] for key in ("shapeseval", "rewards", "fidelity")}
    assert same == {key: first[key] for key in same}
    assert same != {key: first["points"][0][key] for key in same}  # which began as the teacher


STAGED = """  - {name: gdmd, kind: gdmd, start_from: again}
  - {name: first, kind: rival, recipe: dmd, overrides: {loop.lr_fake: 1.0e+30, method.fake_updates: 1}}
  - {name: again, kind: rival, recipe: dmd, overrides: {loop.lr_fake: 1.0e+30, method.fake_updates: 1}}
  - {name: late, kind: rival, recipe: dmd, start_from: first}
"""


def test_a_comparison_whose_shared_first_stage_fails_ends(tmp_path: Path) -> None:
    spec = tmp_path / "staged.yaml"
    spec.write_text(SPEC[: SPEC.index("  - ")] + STAGED + SPEC[SPEC.index("evaluation:") :])
    done = end(start(spec, tmp_path / "made", "--json"))
    assert done.code == 1, done.err
    failed = json.loads(done.out)["failed"]
    assert failed["gdmd/3/updates"] == failed["late/3/updates"] == "its first stage failed"
    assert "not finite" in failed.get("first/3/updates", failed.get("again/3/updates"))


def test_a_cell_ends_when_the_comparison_that_started_it_is_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "job.json").write_text("{}")
    with (tmp_path / "lock").open("w") as held:  # it waits for the lock, and would for ever
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "gdmd.sweep.worker", str(tmp_path), str(gone.pid)]
        cell = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert cell.wait(LIMIT) == -signal.SIGTERM


def test_a_half_trained_cell_of_another_configuration_is_refused(tmp_path: Path, world: World) -> None:
    cell = gdmd_cell(world.spec)
    folder = Path(shutil.copytree(cell.folder(world.folder), cell.folder(tmp_path)))
    (folder / "result.json").unlink()
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace("clip: 1.0", "clip: 2.0"))
    message = "loop.clip: 2.0 -> 1.0"
    probes = shutil.copytree(world.folder / "probes", tmp_path / "probes")
    assert list(probes.iterdir()) and compare_job.main(folder) == compare_job.BAD_INPUT
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_job._student(cell.job, folder)
