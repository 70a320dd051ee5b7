"""What ``gdmd sweep`` does: run the cells that are not finished, several at once, then write the pages. No torch here.

Every cell is a process of its own (``programs.compare_job``), so that a failing one stops no other, memory is measured
per method, and a signal reaches each training at the end of an iteration.
"""

from __future__ import annotations

import json
import os
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
from gdmd.sweep.cells import (
    GRIDS,
    Cell,
    chosen,
    key_of,
    line_of,
    outdated,
    pictured,
    plan,
    read_table,
    shown_cells,
    unique,
    with_first_stages,
)
from gdmd.sweep.spec import Comparison
from gdmd.training.rank import module_arguments

Say = Callable[[str], None]
POLL, PATIENCE = 0.1, 120.0
"""Seconds between looks at the workers, and how long a stopped one may finish its iteration and save."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PICTURES = "gdmd.sweep.pictures"
JOB = "gdmd.sweep.worker"


@dataclass
class Outcome:
    """What a call of the program did. failed: place of the cell -> last line of its log."""

    folder: Path
    cells: int = 0
    trained: list[str] = field(default_factory=list)
    cached: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    signal: int | None = None
    page: Path | None = None

    @property
    def exit_code(self) -> int:
        """0, 1 when a cell failed, 128 + signal when it was stopped."""
        return 128 + self.signal if self.signal is not None else int(bool(self.failed))


def run_comparison(
    comparison: Comparison, source: str, folder: Path, jobs: int, only: Sequence[str], say: Say
) -> Outcome:
    """Finish every chosen cell of the comparison in ``folder``; what is finished there is not done again."""
    wanted = with_first_stages(chosen(plan(comparison), only))
    old = outdated(unique(wanted), folder)
    if old:
        raise RunError(
            f"{len(old)} cells were made with other defaults (there -> here): {'; '.join(old[:3])}. "
            "Delete these folders to make them again, or choose another --out."
        )
    with writing("the comparison", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder / ".lock", f"{folder}: another gdmd sweep is running there; wait for it or use --out"):
        write_atomic(folder / "comparison.yaml", dump_config(comparison.spec), "the comparison")
        table = Table(folder, source)
        outcome = Outcome(folder, len(wanted))
        todo = _unfinished(wanted, folder, table, outcome)
        say(f"{len(wanted)} cells, {outcome.cached} finished before, {len(todo)} to run, {jobs} at once, in {folder}")
        with stop_signals() as stopped:
            _Pool(folder, jobs, table, wanted, outcome, say).run(todo, stopped)
            outcome.signal = stopped[0] if stopped else None
        if outcome.signal is None and not _pictured(comparison, folder):
            say("drawing the images of the figures")
            if _finish(PICTURES, folder, folder / "pictures.log") != 0:
                outcome.failed["pictures"] = _reason(folder / "pictures.log")
    return outcome


class Table:
    """OUT/table.jsonl: one line per cell; each is written at once and whole, or not at all."""

    def __init__(self, folder: Path, source: str) -> None:
        self.path, self.source = folder / "table.jsonl", source
        self._rows = {key_of(row): row for row in read_table(self.path)}

    def add(self, cell: Cell) -> dict[str, Any]:
        """Append the line of a finished cell, unless it is there; that of an earlier result is replaced."""
        file = cell.folder(self.path.parent) / "result.json"
        command = f"gdmd sweep {typed(self.source)} --only {cell.place}"
        line = line_of(cell, read_json(file, "Delete it, and the cell is measured again."), command)
        known = self._rows.get(cell.key)
        self._rows[cell.key] = line
        if known is None:
            append_jsonl(self.path, [line], "the table", option="--out")
        elif known | {"command": command} != line:
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self._rows.values()), "the table")
        return line


class _Pool:
    """At most ``jobs`` workers at a time."""

    def __init__(
        self, folder: Path, jobs: int, table: Table, wanted: Sequence[Cell], outcome: Outcome, say: Say
    ) -> None:
        self.folder, self.jobs, self.table, self.wanted, self.outcome = folder, jobs, table, wanted, outcome
        self.say, self._done, self._running = say, 0, dict[subprocess.Popen[bytes], tuple[Cell, float]]()
        self._failed = set[str]()  # hashes: rows of other names may share a cell

    def run(self, todo: Sequence[Cell], stopped: Sequence[int]) -> None:
        """Until all are done, or a signal arrives: then the running ones save and end."""
        waiting = list(todo)
        while (waiting or self._running) and not stopped:
            while len(self._running) < self.jobs and (cell := self._next(waiting)):
                waiting.remove(cell)
                self._start(cell)
            time.sleep(POLL)
            for worker in [worker for worker in self._running if worker.poll() is not None]:
                self._end(worker, len(todo))
        if self._running:
            self._stop()

    def _next(self, waiting: list[Cell]) -> Cell | None:
        """The first cell that can begin; those whose first stage failed, or is gone, fail with it."""
        for cell in [each for each in waiting if each.first and each.first.hash in self._failed]:
            waiting.remove(cell)
            self._fail(cell, "its first stage failed")
        ready = next((cell for cell in waiting if self._ready(cell)), None)
        if ready is None and not self._running:  # nothing that still runs could make one of them ready
            for cell in waiting:
                self._fail(cell, "its first stage has no result")
            waiting.clear()
        return ready

    def _fail(self, cell: Cell, reason: str) -> None:
        self._failed.add(cell.hash)
        self.outcome.failed[cell.place] = reason

    def _ready(self, cell: Cell) -> bool:
        return cell.first is None or (cell.first.folder(self.folder) / "result.json").exists()

    def _start(self, cell: Cell) -> None:
        folder = cell.folder(self.folder)
        with writing("the cell", folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "job.json", json.dumps(cell.job, indent=1), "the cell's job")
        with (folder / "log.txt").open("ab") as log:
            self._running[_worker(JOB, folder, log)] = cell, time.perf_counter()

    def _end(self, worker: subprocess.Popen[bytes], total: int) -> None:
        cell, began = self._running.pop(worker)
        self._done += 1
        head = f"[{self._done}/{total}] {cell.place}"
        if worker.returncode != 0:
            reason = _reason(cell.folder(self.folder) / "log.txt") or f"exit code {worker.returncode}"
            self._fail(cell, reason)
            self.say(f"{head} FAILED ({reason}); log: {cell.folder(self.folder) / 'log.txt'}")
            return
        self.outcome.trained.append(cell.place)
        for same in [each for each in self.wanted if each.hash == cell.hash]:
            line = self.table.add(same)
        self.say(f"{head}: ShapesEval {line['shapeseval']:.3f} ({time.perf_counter() - began:.0f} s)")

    def _stop(self) -> None:
        self.say(f"stopping: {len(self._running)} cells save their state; the same command goes on from there")
        for worker in self._running:
            worker.terminate()
        for worker in self._running:
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _unfinished(wanted: Sequence[Cell], folder: Path, table: Table, outcome: Outcome) -> list[Cell]:
    """The cells to run; lines of cells that finished without one (a crash in between) are added."""
    finished = [cell for cell in wanted if (cell.folder(folder) / "result.json").exists()]
    for cell in finished:
        table.add(cell)
    outcome.cached = len(finished)
    done = {cell.hash for cell in finished}
    return [cell for cell in unique(wanted) if cell.hash not in done]


def _pictured(comparison: Comparison, folder: Path) -> bool:
    """Whether the images of the figures are drawn (or there are none to draw)."""
    grids = all((folder / "figures" / name).exists() for name in GRIDS)
    return not shown_cells(comparison, folder) or (grids and pictured(comparison, folder))


def _worker(module: str, folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process in its own session: Ctrl-C reaches us alone, and we pass it on. It ends when we are gone."""
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


def _reason(log: Path) -> str:
    """The newest error of a log (a traceback's last line where there is none), on one short line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    told = [line for line in lines if line.strip()]
    errors = [line for line in told if line.startswith("error: ")]
    return shorten((errors or told or [""])[-1].removeprefix("error: "), 200)
