"""A sweep end to end: it is stopped and continued, a failing run leaves the others alone, nothing is done twice."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from gdmd.sweep import pool, worker
from gdmd.sweep.pool import run_sweep
from gdmd.sweep.runs import SweepRun, plan, read_table
from gdmd.sweep.spec import read_sweep

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """name: tiny
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
images: {rows: [gdmd], per_cluster: 1, captions: 2}
"""
VARYING = {"seconds", "cell_seconds", "images_per_s", "images_per_s_decoded", "peak_memory_mib", "commit"}
"""Times and the state of the checkout; everything else must be equal bit for bit."""
LIMIT = 300.0
"""Longest wait on a busy machine, in seconds."""


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Done:
    """What two calls of the command left: the first was interrupted, the second continued to the end."""

    folder: Path
    config: Path
    steps_at_stop: list[str]
    stopped: Finished
    ended: Finished

    @property
    def line(self) -> dict[str, Any]:
        return next(line for line in read_table(self.folder / "table.jsonl") if line["method"] == "gdmd")


def start(config: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gdmd", "sweep", str(config), "--out", str(folder), "--jobs", "3", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=config.parent
    )


def end(process: subprocess.Popen[str]) -> Finished:
    try:
        out_text, err_text = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return Finished(process.returncode, out_text, err_text)


def gdmd_run(config: Path) -> SweepRun:
    return next(run for run in plan(read_sweep(str(config))) if run.method == "gdmd")


def work(run: SweepRun, out: Path) -> dict[str, Any]:
    """Run the worker in this process; returns its result."""
    run.folder(out).mkdir(parents=True)
    (run.folder(out) / "job.json").write_text(json.dumps(run.job))
    assert worker.main(run.folder(out)) == 0
    found: dict[str, Any] = json.loads(run.result(out).read_text())
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    here = tmp_path_factory.mktemp("sweep")
    config, folder = here / "tiny.yaml", here / "out"
    config.write_text(CONFIG)
    first = start(config, folder, "--only", "gdmd")
    checkpoints = gdmd_run(config).folder(folder) / "run" / "checkpoints"
    until = time.monotonic() + LIMIT
    while not list(checkpoints.glob("step_*")) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    stopped = end(first)
    steps = sorted(path.name for path in checkpoints.glob("step_*"))
    yield Done(folder, config, steps, stopped, end(start(config, folder, "--json")))


def test_ctrl_c_saves_a_checkpoint(done: Done) -> None:
    assert done.stopped.code == 130, done.stopped.err
    assert done.steps_at_stop and "step_000015" not in done.steps_at_stop
    assert "the same command continues" in done.stopped.err and "Traceback" not in done.stopped.err


def test_a_failing_run_is_reported_and_the_others_are_finished(done: Done) -> None:
    assert done.ended.code == 1, done.ended.err
    told = json.loads(done.ended.out)
    assert list(told["failed"]) == ["broken/3/updates"] and "not finite" in told["failed"]["broken/3/updates"]
    assert told["rows"].keys() == {"gdmd", "teacher_1"} and told["missing"] == 1
    assert Path(told["page"]).is_file()
    names = {path.name for path in (done.folder / "figures").iterdir()}
    assert {"fig6_grid.png", "fig7_grid.png", "fig3_features.png"} <= names
    assert "[1/3] " in done.ended.err and " left)" in done.ended.err


def test_resume_equals_an_uninterrupted_run(done: Done, tmp_path: Path) -> None:
    run, line = gdmd_run(done.config), done.line
    resumed = json.loads((run.folder(done.folder) / "run" / "run.json").read_text())["resumed"]
    assert len(resumed) == 1 and 0 < resumed[0]["step"] < 15
    alone = work(run, tmp_path)
    assert {k: (alone[k], line[k]) for k in alone.keys() - VARYING if alone[k] != line[k]} == {}
    assert line["student_updates"] == 30 and line["steps"] == 15 and line["nfe"] == 4 and line["seed"] == 3
    assert line["passes"] > 15 * 2 * (1 + 2 * 9) and line["trained"] == ["shapes_clip", "shapes_pref"]
    assert line["command"].endswith("--only gdmd/3/updates") and line["hash"] == run.hash


def test_finished_runs_are_not_repeated_and_a_lost_line_is_restored(done: Done) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done.folder / "runs").rglob("*")}
    path = done.folder / "table.jsonl"
    lines = path.read_text().splitlines()
    for text in (path.read_text(), path.read_text()[:-30]):  # the second as after a crash
        path.write_text(text)
        messages: list[str] = []
        sweep = read_sweep(str(done.config))
        outcome = run_sweep(sweep, str(done.config), done.folder, 1, ["gdmd", "teacher_1"], messages.append)
        assert (outcome.trained, outcome.cached, outcome.exit_code) == ([], 2, 0)
        assert "2 already finished, 0 to do" in messages[0] and len(messages) == 1
        assert sorted(path.read_text().splitlines()) == sorted(lines)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_run_can_be_evaluated_like_any_run(done: Done) -> None:
    from gdmd.evaluation.runs import measure_named

    _, row, _ = measure_named(str(gdmd_run(done.config).folder(done.folder) / "run"), "eval", {})
    assert row["shapeseval"]["overall"] == done.line["shapeseval"] and row["fidelity"] == done.line["fidelity"]


def test_a_half_trained_run_with_another_config_is_refused(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = gdmd_run(done.config)
    shutil.copytree(run.folder(done.folder), run.folder(tmp_path))
    run.result(tmp_path).unlink()
    config = run.folder(tmp_path) / "run" / "config.yaml"
    config.write_text(config.read_text().replace("clip: 1.0", "clip: 2.0"))
    assert worker.main(run.folder(tmp_path)) == worker.BAD_INPUT
    assert "loop.clip: 2.0 -> 1.0" in capsys.readouterr().err


def test_a_second_stage_starts_with_the_averaged_student_of_its_first(tmp_path: Path) -> None:
    rows = "  - {name: first, kind: baseline, recipe: dmd, student_updates: 3, overrides: {method.fake_updates: 1}}\n"
    rows += "  - {name: gdmd, kind: gdmd, start_from: first}\n"
    text = CONFIG.replace("student_updates: 30", "student_updates: 2")
    text = text.replace("{seeds: 0}", "{seeds: 1, points: 1, per_task: 1, images: 2}")
    path = tmp_path / "stages.yaml"
    path.write_text(text[: text.index("  - ")] + rows + text[text.index("teachers:") :])
    results = {run.method: work(run, tmp_path) for run in plan(read_sweep(str(path)))[1:]}
    first, second = results["first"], results["gdmd"]
    assert first["student_updates"] == 3 and second["student_updates"] == 2
    at_start = {key: second["points"][0][key] for key in ("shapeseval", "rewards", "fidelity")}
    assert at_start == {key: first[key] for key in at_start}
    assert at_start != {key: first["points"][0][key] for key in at_start}  # which started as the teacher


def test_a_run_exits_when_its_sweep_is_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "job.json").write_text("{}")
    with (tmp_path / "lock").open("w") as held:  # the worker would wait for the lock forever
        fcntl.flock(held, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "gdmd.sweep.worker", str(tmp_path), str(gone.pid)]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert process.wait(LIMIT) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("echo 'KeyError: 3'; exit 1", "KeyError: 3"),
        ("exit 7", "exit code 7"),
        ("echo 'step 4/30'; kill -KILL $$", "killed by SIGKILL, as the system does when memory runs out"),
    ],
)
def test_a_failure_is_explained_by_the_last_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, reason: str
) -> None:
    """The log of a run also holds what earlier attempts have printed."""
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    sweep, found = read_sweep(str(config)), []
    for command in ("echo 'error: the disk is full'; exit 2", second):

        def worker(module: str, folder: Path, log: IO[bytes], shell: str = command) -> subprocess.Popen[bytes]:
            return subprocess.Popen(["sh", "-c", shell], stdout=log)

        monkeypatch.setattr(pool, "_worker", worker)
        outcome = run_sweep(sweep, str(config), tmp_path / "out", 1, ["teacher_1"], lambda text: None)
        found += outcome.failed.values()
    assert found == ["the disk is full", reason]
