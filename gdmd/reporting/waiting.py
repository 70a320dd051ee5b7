"""Progress of a long wait: a bar on a terminal, elsewhere a line at the start and at most every ten seconds. On stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_PER_LINE = 10.0


@contextmanager
def waiting(
    what: str, total: int | None, console: Console | None = None, then: str = ""
) -> Iterator[Callable[[int], None]]:
    """A function that counts finished parts of ``total`` (None = unknown). then: what is done after the last part."""
    if total == 0:
        yield lambda count: None
        return
    console = console or Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what} ...", markup=False, highlight=False, soft_wrap=True)
        done, last = 0, time.monotonic()

        def line(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last > SECONDS_PER_LINE:
                last = time.monotonic()
                console.print(f"{what}: {done} of {total}", markup=False, highlight=False, soft_wrap=True)

        yield line
        return
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)

        def advance(count: int) -> None:
            progress.advance(task, count)
            if then and progress.tasks[0].finished:
                progress.update(task, description=f"{what}: {then}", total=None)  # a bar without an end

        yield advance
