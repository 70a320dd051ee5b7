"""What the user sees while training: a bar on a terminal, one plain line per logged step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = {
    "loss/student": "student",
    "loss/fake": "fake",
    "loss/dmd": "dmd",
    "loss/rl": "rl",
    "reward/sample": "R(x0)",
    "reward/target": "R(target)",
    "weight/mean": "w",
    "weight/effective": "targets",
    "weight/share_below_half": "r<1/2",
    "speed/images_per_s": "images/s",
}
"""Statistics that are shown when a method gives them, by their short name; other loss/... keys follow loss/rl."""


def summary(values: Mapping[str, float]) -> str:
    """One line of the shown statistics, in their order; what was not scored reads "-"."""
    parts = {key: key.removeprefix("loss/") for key in values if key.startswith("loss/")}
    names = {key: SHOWN.get(key, parts.get(key)) for key in [*SHOWN, *parts]}
    shown = {key: names[key] for key in sorted(names, key=_place) if key in values}
    texts = {key: "-" if isnan(values[key]) else f"{values[key]:.3g}" for key in shown}
    return "  ".join(f"{name} {texts[key]}" for key, name in shown.items())


class PlainProgress:
    """One line per logged step, for files, pipes and CI."""

    def __init__(self, steps: int, stream: IO[str] | None = None) -> None:
        self.steps, self._stream = steps, stream or sys.stderr
        self._first: int | None = None
        self._start = time.perf_counter()

    def advance(self, step: int) -> None:
        if self._first is None:
            self._first, self._start = step, time.perf_counter()

    def row(self, step: int, values: Mapping[str, float]) -> None:
        done = step - (self._first or 0)
        per_step = (time.perf_counter() - self._start) / done if done else float("nan")
        left = "" if isnan(per_step) else f"  ETA {_clock(per_step * (self.steps - step))}"
        self.note(f"step {step}/{self.steps}  {summary(values)}{left}")

    def note(self, message: str) -> None:
        print(message, file=self._stream, flush=True)


class BarProgress:
    """A rich bar with the newest row below it."""

    def __init__(self, steps: int, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("training", total=steps, row="")

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._progress.update(self._task, row=summary(values))

    def note(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)


@contextmanager
def progress_for(steps: int, console: Console | None = None) -> Iterator[PlainProgress | BarProgress]:
    """A bar when the console is a terminal, plain lines otherwise; both go to stderr."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield PlainProgress(steps, console.file)
        return
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(), TextColumn("{task.fields[row]}"))
    with Progress(*columns, console=console) as progress:
        yield BarProgress(steps, progress)


def _place(key: str) -> tuple[int, str]:
    order = list(SHOWN)
    return (order.index(key), "") if key in SHOWN else (order.index("loss/rl"), key)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
