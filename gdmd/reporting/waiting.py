"""Progress of a long wait: a bar on a terminal, one line elsewhere. Written to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Part = TypeVar("Part", bound=Sequence)


@contextmanager
def waiting(what: str, total: int, console: Console | None = None, then: str = "") -> Iterator[Callable[[int], None]]:
    """A function that counts finished parts of ``total``. then: what is done after the last part."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what} ...", markup=False, highlight=False, soft_wrap=True)
        yield lambda count: None
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


def counted(parts: Iterable[Part], what: str, total: int) -> Iterator[Part]:
    """The parts of ``total`` items one by one, with the progress shown. Silent without items."""
    if not total:
        return
    with waiting(what, total) as advance:
        for part in parts:
            yield part
            advance(len(part))
