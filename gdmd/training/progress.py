"""What the user sees while training: on a terminal a bar with the metrics below it, elsewhere one line per log interval."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from typing import IO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from gdmd.config.validation import PREFIX, TEACHER, split_size

SHOWN = {
    "loss/student": ("student", "loss of the student"),
    "loss/fake": ("fake", "loss of the fake score"),
    "loss/dmd": ("dmd", "distribution-matching part of the student's loss"),
    "loss/rl": ("rl", "reward part of the student's loss"),
    "reward/sample": ("R(x0)", "reward of the student's images"),
    "reward/target": ("R(target)", "reward of the targets"),
    "weight/mean": ("w", "weight of the step toward the targets"),
    "weight/effective": ("targets", "effective number of targets"),
    "weight/share_below_half": ("r<1/2", "share of targets with an optimality score r below 1/2"),
    "speed/images_per_s": ("images/s", "samples trained per second"),
}
"""The statistics that are shown if a method has them: short name and meaning. Other loss/... keys follow loss/rl."""
FIRST = "the first iteration is slower: it compiles kernels and fills caches"


def summary(values: Mapping[str, float]) -> list[str]:
    """ "NAME VALUE" of each shown statistic, in their order; the value of what was not scored is "-"."""
    texts = {key: "-" if isnan(value) else f"{value:.3g}" for key, value in values.items()}
    return [f"{_short(key)} {texts[key]}" for key in _shown(values)]


def legend(values: Mapping[str, float]) -> str:
    """What the short names of ``summary`` mean, in one line."""
    return "; ".join(f"{SHOWN[key][0]} = {SHOWN[key][1]}" for key in _shown(values) if key in SHOWN)


def validation_line(step: int, scores: Mapping[str, float]) -> str:
    """The validation scores of a step over all sizes in lines of 80 columns; those of the teacher in parentheses."""
    shown = {key: "-" if isnan(score) else f"{score:.3g}" for key, score in scores.items()}
    own = {
        key.removeprefix(PREFIX): text
        for key, text in shown.items()
        if not key.startswith(TEACHER) and not split_size(key)[1]
    }
    known = {label: f" (teacher {shown[TEACHER + label]})" if TEACHER + label in shown else "" for label in own}
    parts = [
        f"{label.removeprefix('images/')} {text}{known[label]}".replace(" ", "\xa0") for label, text in own.items()
    ]
    line = f"step {step}, validation: {', '.join(parts)}"
    return textwrap.fill(line, 80, subsequent_indent="  ", break_long_words=False).replace("\xa0", " ")


class Pace:
    """Seconds per step in this process. The first step does not count: it compiles and fills caches."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def advance(self, step: int) -> None:
        """``step`` steps are finished."""
        self._last = (step, time.perf_counter())
        self._first = self._first or self._last

    @property
    def per_step(self) -> float | None:
        """None until two steps are finished."""
        if self._first is None or self._last[0] == self._first[0]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    def eta(self) -> str:
        """The time that is left, such as "1:02:03"; "-:--" while it is unknown."""
        return "-:--" if self.per_step is None else duration(self.per_step * (self.steps - self._last[0]))


class PlainProgress:
    """One line per log interval, for files, pipes and CI."""

    def __init__(self, steps: int, stream: IO[str] | None = None) -> None:
        self._pace, self._stream = Pace(steps), stream or sys.stderr
        self._explained = False

    def begin(self, step: int) -> None:
        if step < self._pace.steps:
            self.note(FIRST)

    def advance(self, step: int) -> None:
        self._pace.advance(step)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        if not self._explained and legend(values):
            self.note(f"metrics: {legend(values)}")
        self._explained = True
        eta = "" if self._pace.per_step is None else f"ETA {self._pace.eta()}"
        self.note("  ".join(filter(None, [f"step {step}/{self._pace.steps}", *summary(values), eta])))

    def note(self, message: str) -> None:
        print(message, file=self._stream, flush=True)

    def status(self, doing: str) -> None:
        return


class _TwoLines(Progress):
    """A bar with lines of text below it."""

    text = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.text:
            items = self.text.replace("  ", "\t").replace(" ", "\xa0").replace("\t", "  ")
            for line in textwrap.wrap(items, max(20, self.console.width - 1)):  # a name stays with its value
                yield Text(line.replace("\xa0", " "), no_wrap=True)


class BarProgress:
    """A bar with step, pace and ETA; the newest row, or what the program is doing, below it."""

    def __init__(self, steps: int, progress: _TwoLines) -> None:
        self._progress, self._pace, self._row, self._explained = progress, Pace(steps), "", False
        self._task = progress.add_task("train", total=steps, pace="", eta="-:--")

    def begin(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
        self._row = FIRST if step < self._pace.steps else ""
        self._show(self._row)

    def advance(self, step: int) -> None:
        self._pace.advance(step)
        pace = "" if self._pace.per_step is None else f"{self._pace.per_step:.3g} s/step"
        self._progress.update(self._task, completed=step, pace=pace, eta=self._pace.eta())
        self._row = "" if self._row == FIRST else self._row
        self._show(self._row)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        if not self._explained and legend(values):
            self.note(f"metrics: {legend(values)}")
        self._explained = True
        self._row = "  ".join(summary(values))
        self._show(self._row)

    def note(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)

    def status(self, doing: str) -> None:
        self._show(doing or self._row)

    def _show(self, text: str) -> None:
        self._progress.text = text


@contextmanager
def progress_for(steps: int, console: Console | None = None) -> Iterator[PlainProgress | BarProgress]:
    """A bar if the console is a terminal, plain lines otherwise; the console is stderr by default."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield PlainProgress(steps, console.file)
        return
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:.0f}%"),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}"),
    )
    with _TwoLines(*columns, console=console, expand=True) as progress:
        yield BarProgress(steps, progress)


def duration(seconds: float) -> str:
    """Such as "0:07", "12:34" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _shown(values: Mapping[str, float]) -> list[str]:
    order = list(SHOWN)
    known = [key for key in order if key in values]
    others = sorted(key for key in values if key.startswith("loss/") and key not in SHOWN)
    return sorted([*known, *others], key=lambda key: order.index(key if key in SHOWN else "loss/rl"))


def _short(key: str) -> str:
    return SHOWN[key][0] if key in SHOWN else key.removeprefix("loss/")
