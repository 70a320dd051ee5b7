"""What ``gdmd sweep`` does: run what is not finished, several runs at once, then draw the images. Imports no torch.

Every run is a separate process (``sweep.worker``), so that a failing run stops no other, memory is measured per method,
and each training handles a signal at the end of an iteration.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import IO, Any

from gdmd.config.load import dump_config
from gdmd.io import RunError, append_jsonl, read_json, typed, write_atomic, writing
from gdmd.runs.process import folder_lock, stop_signals
from gdmd.sweep.runs import (
    GRIDS,
    SweepRun,
    figure_folder,
    images_are_current,
    key_of,
    line_of,
    outdated,
    plan,
    read_table,
    selected,
    shown_runs,
    unique,
    with_first_stages,
)
from gdmd.sweep.spec import Sweep
from gdmd.training.rank import module_arguments

Log = Callable[[str], None]
POLL, PATIENCE = 0.1, 120.0
"""Seconds between checks of the workers, and how long a stopped one may take to finish its iteration and save."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
IMAGES = "gdmd.sweep.images"
WORKER = "gdmd.sweep.worker"
FAILED_FIRST, MISSING_FIRST = "its first stage failed", "its first stage has no result"


@dataclass(frozen=True)
class Status:
    """The progress of a sweep. seconds_left: from the mean time of the runs finished so far; None before the first."""

    done: int
    total: int
    running: Sequence[str]
    seconds_left: float | None


Show = Callable[[Status], None]


@dataclass
class Outcome:
    """What one call of ``gdmd sweep`` did. failed: name of a run -> the error in its log."""

    folder: Path
    runs: int = 0
    trained: list[str] = field(default_factory=list)
    cached: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    signal: int | None = None
    page: Path | None = None

    @property
    def exit_code(self) -> int:
        """0, 1 if a run failed, 128 + signal if the sweep was stopped."""
        return 128 + self.signal if self.signal is not None else int(bool(self.failed))


def run_sweep(
    sweep: Sweep,
    source: str,
    folder: Path,
    jobs: int,
    only: Sequence[str],
    log: Log,
    show: Show = lambda status: None,
) -> Outcome:
    """Finish every selected run of the sweep in ``folder``; finished runs are not repeated.

    log: gets messages; show: gets the status whenever a run starts or ends.
    """
    wanted = with_first_stages(selected(plan(sweep), only))
    old = outdated(unique(wanted), folder)
    if old:
        raise RunError(
            f"{len(old)} runs were made with other defaults (then -> now): {'; '.join(old[:3])}. "
            "Delete these folders to repeat the runs, or choose another --out."
        )
    with writing("the sweep", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder / ".lock", f"{folder}: another gdmd sweep is running there; wait for it or use --out"):
        write_atomic(folder / "sweep.yaml", dump_config(sweep.config), "the sweep config")
        table = Table(folder, source)
        outcome = Outcome(folder, len(wanted))
        todo = _unfinished(wanted, folder, table, outcome)
        log(f"{len(wanted)} runs, {outcome.cached} already finished, {len(todo)} to do, {jobs} at once, in {folder}")
        with stop_signals() as stopped:
            _Pool(folder, jobs, table, wanted, outcome, log, show).run(todo, stopped)
            outcome.signal = stopped[0] if stopped else None
        if outcome.signal is None and not _images_drawn(sweep, folder):
            log("generating the images of the figures")
            if code := _finish(IMAGES, folder, folder / "images.log"):
                outcome.failed["images"] = _reason(folder / "images.log", code)
    return outcome


class Table:
    """OUT/table.jsonl: one line per run, appended as soon as the run is finished."""

    def __init__(self, folder: Path, source: str) -> None:
        self.path, self.source = folder / "table.jsonl", source
        self._rows = {key_of(row): row for row in read_table(self.path)}

    def add(self, run: SweepRun) -> dict[str, Any]:
        """Append the line of a finished run unless it is there; a line of an earlier result is replaced."""
        file = run.result(self.path.parent)
        command = f"gdmd sweep {typed(self.source)} --only {run.name}"
        line = line_of(run, read_json(file, "Delete it to measure the run again."), command)
        known = self._rows.get(run.key)
        self._rows[run.key] = line
        if known is None:
            append_jsonl(self.path, [line], "the table", option="--out")
        elif known | {"command": command} != line:
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self._rows.values()), "the table")
        return line


@dataclass
class _Pool:
    """Runs at most ``jobs`` workers at a time."""

    folder: Path
    jobs: int
    table: Table
    wanted: Sequence[SweepRun]
    outcome: Outcome
    log: Log
    show: Show
    _total: int = 0
    _seconds: list[float] = field(default_factory=list)  # of the runs that ended
    _running: dict[subprocess.Popen[bytes], tuple[SweepRun, float, int]] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)  # hashes: rows of different names may share a run

    def run(self, todo: Sequence[SweepRun], stopped: Sequence[int]) -> None:
        """Work until all runs are done or a signal arrives; after a signal the running ones save and exit."""
        waiting, self._total = list(todo), len(todo)
        while (waiting or self._running) and not stopped:
            while len(self._running) < self.jobs and (run := self._next(waiting)):
                waiting.remove(run)
                self._start(run)
            time.sleep(POLL)
            for worker in [worker for worker in self._running if worker.poll() is not None]:
                self._end(worker)
        if self._running:
            self._stop()

    def _next(self, waiting: list[SweepRun]) -> SweepRun | None:
        """The first run that can start; a second stage fails if its first stage failed or has no result."""
        for run in [each for each in waiting if each.first_stage and each.first_stage.hash in self._failed]:
            waiting.remove(run)
            self._fail(run, FAILED_FIRST)
        ready = next((run for run in waiting if self._ready(run)), None)
        if ready is None and not self._running:  # no run is left that could produce the missing result
            for run in waiting:
                self._fail(run, MISSING_FIRST)
            waiting.clear()
        return ready

    def _fail(self, run: SweepRun, reason: str) -> None:
        self._failed.add(run.hash)
        self.outcome.failed[run.name] = reason

    def _ready(self, run: SweepRun) -> bool:
        return run.first_stage is None or run.first_stage.result(self.folder).exists()

    def _start(self, run: SweepRun) -> None:
        folder = run.folder(self.folder)
        with writing("the run", folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "job.json", json.dumps(run.job, indent=1), "the run's job")
        with (folder / "log.txt").open("ab") as log:
            size = log.tell()  # earlier attempts stay in the log
            self._running[_worker(WORKER, folder, log)] = run, time.perf_counter(), size
        self.show(self.status())

    def _end(self, worker: subprocess.Popen[bytes]) -> None:
        run, began, size = self._running.pop(worker)
        self._seconds.append(time.perf_counter() - began)
        status = self.status()
        head = f"[{status.done}/{status.total}] {run.name}"
        if worker.returncode != 0:
            file = run.folder(self.folder) / "log.txt"
            reason = _reason(file, worker.returncode, size)
            self._fail(run, reason)
            self.log(f"{head} FAILED ({reason}); log: {file}")
        else:
            self.outcome.trained.append(run.name)
            for same in [each for each in self.wanted if each.hash == run.hash]:
                line = self.table.add(same)
            left = f", about {duration(status.seconds_left)} left" if status.seconds_left else ""
            self.log(f"{head}: ShapesEval {line['shapeseval']:.3f} ({duration(self._seconds[-1])}{left})")
        self.show(status)

    def status(self) -> Status:
        """The progress so far."""
        done = len(self._seconds)
        each = sum(self._seconds) / done if done else None
        left = None if each is None else each * (self._total - done) / min(self.jobs, max(self._total - done, 1))
        return Status(done, self._total, [run.name for run, *_ in self._running.values()], left)

    def _stop(self) -> None:
        self.log(f"stopping: {len(self._running)} runs save their state; the same command continues")
        for worker in self._running:
            worker.terminate()
        for worker in self._running:
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def duration(seconds: float) -> str:
    """58 s, 12 min or 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _unfinished(wanted: Sequence[SweepRun], folder: Path, table: Table, outcome: Outcome) -> list[SweepRun]:
    """The runs to do; if a crash left a finished run without its line, the line is added."""
    finished = [run for run in wanted if run.result(folder).exists()]
    for run in finished:
        table.add(run)
    outcome.cached = len(finished)
    done = {run.hash for run in finished}
    return [run for run in unique(wanted) if run.hash not in done]


def _images_drawn(sweep: Sweep, folder: Path) -> bool:
    """Whether the images of the figures are drawn (or there are none to draw)."""
    grids = all((figure_folder(sweep, folder) / name).exists() for name in GRIDS)
    return not shown_runs(sweep, folder) or (grids and images_are_current(sweep, folder))


def _worker(module: str, folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a worker in a separate session, so that Ctrl-C reaches only this process, which then stops its workers.

    The worker also exits when this process is gone.
    """
    return subprocess.Popen(
        [sys.executable, *module_arguments(module), str(folder), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, **ONE_THREAD},
    )


def _finish(module: str, folder: Path, log: Path) -> int:
    with log.open("wb") as file:
        worker = _worker(module, folder, file)
        try:
            return worker.wait()
        finally:
            if worker.poll() is None:
                worker.terminate()


def _reason(log: Path, code: int, start: int = 0) -> str:
    """Why a worker ended with this exit code: the last error that it wrote, else its last line (as of a traceback).

    start: size of the log, in bytes, when the worker started. A signal leaves no error.
    """
    if code < 0:
        memory = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{memory}"
    lines = log.read_bytes()[start:].decode("utf-8", errors="replace").splitlines() if log.exists() else []
    printed = [line for line in lines if line.strip()]
    errors = [line for line in printed if line.startswith("error: ")]
    return shorten((errors or printed or [f"exit code {code}"])[-1].removeprefix("error: "), 200)
