"""``gdmd sweep``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdmd.cli.common import Json, log, messages, print_json
from gdmd.runs.process import cores

if TYPE_CHECKING:
    from gdmd.sweep.pool import Log, Outcome, Show
    from gdmd.sweep.spec import Sweep

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A sweep config: a shipped one's name, or a .yaml file.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for runs, table and pages; default: runs/sweep-CONFIG.")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Parallel runs, one CPU thread each; default: one per core.")]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="METHOD[/SEED[/BUDGET]]", help="Only these runs; * matches any. May be repeated."),
]
PagesOnly = Annotated[bool, typer.Option("--pages-only", help="Only rebuild the pages from the table.")]


def sweep_command(
    config: Config,
    folder: Out = None,
    jobs: Jobs = None,
    only: Only = None,
    pages_only: PagesOnly = False,
    json: Json = False,
) -> None:
    """Train and evaluate methods x seeds x budgets, and write tables and figures that compare them.

    The same command continues a sweep that was stopped or killed; finished runs are not repeated. Each finished run adds
    a line to OUT/table.jsonl; OUT/shapes.md is the page (OUT/NAME.md for a sweep over diffusers pipelines).

    \b
    Examples:
      gdmd sweep smoke                        every table and figure, tiny budgets
      gdmd sweep headline --out runs/headline
      gdmd sweep headline --out runs/headline --only gdmd --only 'dmd*/0'
      gdmd sweep pipelines --only 'sd3_*'
      gdmd sweep mine.yaml --jobs 4 --json > summary.json
      gdmd sweep headline --out docs/results --pages-only

    \b
    Exit codes: 0 done, 1 a run failed (the others are done), 2 bad input,
    130 Ctrl-C, 143 SIGTERM.
    """
    from gdmd.sweep.spec import read_sweep

    sweep = read_sweep(config)
    if pages_only and (only or jobs):
        raise ValueError(
            f"{'--only' if only else '--jobs'} is about training, and --pages-only trains nothing and shows all lines "
            "of the table; leave one of them out"
        )
    from gdmd.sweep.pool import Outcome, run_sweep
    from gdmd.sweep.runs import plan, selected

    where = folder or Path("runs") / f"sweep-{sweep.config.name}"
    selected(plan(sweep), only or [])  # report a wrong pattern before anything is written
    outcome = Outcome(where)
    if not pages_only:
        with _progress() as (write, show):
            outcome = run_sweep(sweep, config, where, jobs or cores(), only or [], write, show)
    _report(sweep, config, outcome, pages_only=pages_only, json=json)
    raise typer.Exit(outcome.exit_code)


def _report(sweep: Sweep, source: str, outcome: Outcome, *, pages_only: bool, json: bool) -> None:
    """Pages, the JSON summary, and what failed."""
    from gdmd.sweep.results import summary, write_pages

    outcome.page = write_pages(sweep, source, outcome.folder, only_pages=pages_only)
    if outcome.page:
        log(f"page: {outcome.page}")
    if json:
        print_json(summary(sweep, outcome, only_pages=pages_only))
    for name, reason in outcome.failed.items():
        log(f"failed: {name}: {reason}")


@contextmanager
def _progress() -> Iterator[tuple[Log, Show]]:
    """A bar below the messages on a terminal (runs done, time left, what is running); messages only elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from gdmd.sweep.pool import Status, duration

    console = messages()
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(status: Status) -> None:
            left = f"about {duration(status.seconds_left)} left; " if status.seconds_left else ""
            text = f"{left}running {', '.join(status.running)}" if status.running else ""
            bar.update(task, completed=status.done, total=status.total, description=text)

        yield lambda text: bar.console.print(text, markup=False, highlight=False, soft_wrap=True), show
