"""Progress of a long wait: a bar or spinner on a terminal; elsewhere a line, and one more every ten seconds. On stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Part = TypeVar("Part", bound=Sequence)
SECONDS_PER_LINE = 10.0
SLOW_SECONDS = 5.0
"""A wait that took longer leaves a line on the terminal."""


@contextmanager
def progress_bar(what: str, total: int, then: str = "") -> Iterator[Callable[[int], None]]:
    """A function that counts finished parts of ``total``. then: what is done after the last part."""
    console = Console(stderr=True)
    if not total:
        yield lambda count: None
        return
    if not console.is_terminal:
        console.print(f"{what} ...", markup=False, highlight=False, soft_wrap=True)
        yield _lines(what, total, console)
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


def _lines(what: str, total: int, console: Console) -> Callable[[int], None]:
    """``advance`` without a terminal."""
    done, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > SECONDS_PER_LINE:
            last = time.monotonic()
            console.print(f"{what}: {done:,} of {total:,}", markup=False, highlight=False, soft_wrap=True)

    return advance


def counted(parts: Iterable[Part], what: str, total: int) -> Iterator[Part]:
    """The parts of ``total`` items one by one, with the progress shown. Silent without items."""
    with progress_bar(what, total) as advance:
        for part in parts:
            yield part
            advance(len(part))


@contextmanager
def phase(what: str, console: Console | None = None, *, plain: bool = True) -> Iterator[None]:
    """Show a wait of unknown length: a spinner with the elapsed time on a terminal; elsewhere one line if ``plain``."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        if plain:
            console.print(what, markup=False, highlight=False, soft_wrap=True)
        yield
        return
    began = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield
    if (seconds := time.perf_counter() - began) > SLOW_SECONDS:
        console.print(f"{what}: {seconds:.0f} s", markup=False, highlight=False)
