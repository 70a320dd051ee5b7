"""The work of ``gdmd demo``: rows to measure and students to train, in one process or in two with half of the cores each.

The networks of the Shapes world are small: two processes with one thread each do 1.5 times the work of one with two threads.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gdmd.config.describe import counted, student_updates
from gdmd.config.run import RunConfig
from gdmd.diffusion.generate import Sampler
from gdmd.evaluation.run_report import read_rows, save_rows
from gdmd.evaluation.runs import Row, load_student, measure, row_key
from gdmd.io import RunError, content_hash
from gdmd.programs.train import TrainSettings, run_training
from gdmd.recipes.build import Components, build
from gdmd.recipes.contents import checkpoint_content
from gdmd.recipes.open_run import student_row, teacher_row
from gdmd.recipes.run_folders import TEACHERS
from gdmd.reporting.progress_bar import phase
from gdmd.runs.process import cores
from gdmd.runs.run_folder import Run, check_same_config, create, open_run
from gdmd.sweep.diagnosis import begin

METHODS = ("dmd", "gdmd")
FIRST = "stage 1"
"""Row of the student that both trainings start from."""
LOG = "dmd.log"
"""The file in the folder of the demo that gets the output of the second process."""
Configs = Mapping[str, RunConfig]
"""Configurations by method; the rows of the teacher use that of gdmd."""


@dataclass(frozen=True)
class Share:
    """What one process does: methods to train and measure, the folder of its rows, and whether it measures references."""

    methods: tuple[str, ...]
    rows: Path
    references: bool


@dataclass(frozen=True)
class Measured:
    """A row: what draws its images, its networks, a hash of the weights of a student, and their step."""

    sampler: Sampler
    components: Components
    weights: str = ""
    step: int = 0


def work(configs: Configs, folder: Path, share: Share, console: Console, device: str | None = None) -> int | None:
    """Do a share of the demo, leaving out what is done; the signal that stopped it, or None."""
    with phase("loading the networks", console):
        components = {name: build(configs[name], device) for name in share.methods}
        references = references_of(configs["gdmd"], device) if share.references else []
    stages = _Stages(share.rows, console, len(references) + 2 * len(share.methods))
    for one in references:
        stages.row(configs["gdmd"], one)
    for name in share.methods:
        cfg = configs[name]
        stages.log(f"training {name.upper()}: {counted(updates(cfg), 'update')} from {start(cfg)}")
        settings = TrainSettings(console, evaluation=False)
        trained = run_training(cfg, open_run(folder / name), components[name], settings)
        if trained.end.signal is not None:
            return trained.end.signal
        stages.row(configs["gdmd"], student_of(cfg, folder, name, device))
    return None


def references_of(cfg: RunConfig, device: str | None) -> list[Measured]:
    """The rows that nothing is trained for: the teacher's, and with loop.start_from the student of the first stage."""
    teachers = ("teacher", "teacher-4-plain") if cfg.loop.start_from else TEACHERS  # five columns fit in a terminal
    components = build(cfg, device)
    rows = [Measured(teacher_row(cfg, components, what), components) for what in teachers]
    if not cfg.loop.start_from:
        return rows
    begin(components, cfg)
    tensors = components.roles.parameters("student")
    weights = content_hash(*(tensors[name].detach().cpu().numpy().tobytes() for name in sorted(tensors)))
    return [*rows, Measured(student_row(cfg, components, FIRST), components, weights)]


def student_of(cfg: RunConfig, folder: Path, name: str, device: str | None) -> Measured:
    """The EMA student of a finished training. RunError if its checkpoint is damaged."""
    components, step = build(cfg, device), cfg.loop.steps
    load_student(components, folder / name, step)
    weights = checkpoint_content(folder / name, step)
    return Measured(student_row(cfg, components, name.upper()), components, weights, step)


def updates(cfg: RunConfig) -> int:
    """Student updates of a whole run."""
    return cfg.loop.steps * student_updates(cfg.method)


def start(cfg: RunConfig) -> str:
    """What the student begins as."""
    return f"the student of {cfg.loop.start_from}" if cfg.loop.start_from else "the teacher"


def open_or_create(folder: Path, cfg: RunConfig) -> Run:
    """The run folder of one method, new or to be resumed. RunError if it has another configuration."""
    config = cfg.model_dump(mode="json")
    if (folder / "config.yaml").exists():
        run = open_run(folder)
        check_same_config(run, config)
        return run
    return create(folder, config, sys.argv)


class _Stages:
    """Logs each of ``count`` stages and its time, and stores the finished rows."""

    def __init__(self, folder: Path, console: Console, count: int) -> None:
        self.folder, self.console, self.count, self._number = folder, console, count, 0
        self.rows: dict[str, Row] = dict(read_rows(folder))

    def log(self, message: str) -> None:
        self._number += 1
        self.console.print(f"[{self._number}/{self.count}] {message}", markup=False, highlight=False)

    def row(self, cfg: RunConfig, one: Measured) -> None:
        """Measure a row, unless it is stored."""
        name, images = one.sampler.name, 6 * cfg.eval.per_task * cfg.eval.images
        self.log(f"{name} ({one.sampler.nfe} network calls per image) on {images:,} images")
        began, how = time.perf_counter(), "measured before"
        key = row_key(cfg, one.sampler, one.weights)
        if self.rows.get(name, {}).get("key") != key:
            self.rows[name] = dict(measure(cfg, one.components, one.sampler, step=one.step)) | {"key": key}
            save_rows(self.folder, self.rows)
            how = f"{time.perf_counter() - began:.0f} s"
        overall = self.rows[name]["shapeseval"]["overall"]
        self.console.print(f"      ShapesEval {overall:.3f} ({how})", markup=False, highlight=False)


# ------------------------------------------------------------ two processes


def two_processes(cfg: RunConfig, device: str | None) -> bool:
    """Whether the demo runs in two processes: a second stage on two CPU cores or more, with loop.threads = 0.

    From the teacher on it runs in one, as its published numbers were made.
    """
    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return bool(cfg.loop.start_from) and cfg.loop.threads == 0 and on_cpu and cores() > 1


def in_two_processes(configs: Configs, folder: Path, console: Console) -> int | None:
    """DMD and the references in a second process, GDMD in this one; the signal that stopped one of them, or None.

    RunError if the second process failed.
    """
    log = folder / LOG
    console.print(
        f"A second process trains DMD and measures the reference models; its log: {log}", markup=False, highlight=False
    )
    before, threads = torch.get_num_threads(), min(torch.get_num_threads(), cores() // 2)
    child = get_context("spawn").Process(target=_second, args=(configs, folder, threads), daemon=True)
    torch.set_num_threads(threads)
    _start_ignoring_ctrl_c(child)
    try:
        stopped_by = work(configs, folder, Share(("gdmd",), folder, references=False), console)
        if stopped_by is None:
            with phase("waiting for the second process", console):
                child.join()
    finally:
        torch.set_num_threads(before)
        if child.is_alive():
            child.terminate()  # its training saves a checkpoint
        child.join()
    if stopped_by is not None:
        return stopped_by
    lines = log.read_text(encoding="utf-8").splitlines()
    if child.exitcode in (128 + 2, 128 + 15):
        return child.exitcode - 128
    if child.exitcode:
        raise RunError(
            f"the second process of the demo failed: {lines[-1] if lines else 'no message'}. Its log: {log}."
        )
    console.print("the second process has done:")
    for line in lines:
        if line.startswith("[") or line.lstrip().startswith("ShapesEval"):
            console.print(line, markup=False, highlight=False)
    return None


def _start_ignoring_ctrl_c(child: Any) -> None:
    """Ctrl-C reaches both processes. The first one ends the second, whose training saves a checkpoint."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the new process inherits
    try:
        child.start()
    finally:
        signal.signal(signal.SIGINT, before)


def _second(configs: Configs, folder: Path, threads: int) -> None:
    """The second process; its exit code is 0, 2 after an error, or 128 + signal."""
    torch.set_num_threads(threads)
    with _printing_to(folder / LOG) as console:
        try:
            stopped_by = work(configs, folder, Share(("dmd",), folder / "dmd", references=True), console, "cpu")
        except ValueError as error:
            console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
            sys.exit(2)
    sys.exit(128 + stopped_by if stopped_by else 0)


@contextmanager
def _printing_to(file: Path) -> Iterator[Console]:
    """stdout and stderr go to a file, line by line."""
    with file.open("w", encoding="utf-8", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
        yield Console(file=stream, width=80)
