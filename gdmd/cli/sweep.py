"""``gdmd sweep``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdmd.cli.common import Json, messages, print_json

if TYPE_CHECKING:
    from gdmd.sweep.pool import Outcome, Say
    from gdmd.sweep.spec import Comparison

Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A comparison: a shipped one's name, or a .yaml file.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of cells, table and pages; default: runs/sweep-SPEC.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Cells at a time, one CPU thread each; default: the cores.")]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="METHOD[/SEED[/BUDGET]]", help="Only these cells; * stands for any. May be repeated."),
]
PagesOnly = Annotated[bool, typer.Option("--pages-only", help="Make the pages again from the table.")]


def sweep_command(
    spec: Spec,
    folder: Out = None,
    jobs: Jobs = None,
    only: Only = None,
    pages_only: PagesOnly = False,
    json: Json = False,
) -> None:
    """Train and measure methods x seeds x budgets, and write the tables and figures of the comparison.

    A comparison that was stopped or killed goes on with the same command; finished cells are not done again. After each
    cell a line is added to OUT/table.jsonl; OUT/shapes.md is the page.

    \b
    Examples:
      gdmd sweep smoke                                  every table and figure from tiny budgets
      gdmd sweep headline --out runs/headline
      gdmd sweep headline --out runs/headline --only gdmd --only 'dmd*/0'
      gdmd sweep mine.yaml --jobs 4 --json > summary.json
      gdmd sweep headline --out docs/results --pages-only

    \b
    Exit codes: 0 done, 1 a cell failed (the others are done), 2 bad input, 130 Ctrl-C, 143 SIGTERM.
    """
    from gdmd.sweep.spec import read_comparison

    comparison = read_comparison(spec)
    from gdmd.sweep.cells import chosen, plan
    from gdmd.sweep.pool import Outcome, run_comparison

    where = folder or Path("runs") / f"sweep-{comparison.spec.name}"
    chosen(plan(comparison), only or [])  # a wrong pattern is an error before anything is written
    outcome = Outcome(where)
    if not pages_only:
        outcome = run_comparison(comparison, spec, where, jobs or _cores(), only or [], _say)
    _report(comparison, spec, outcome, required=pages_only, json=json, say=_say)
    raise typer.Exit(outcome.exit_code)


def _report(comparison: Comparison, source: str, outcome: Outcome, *, required: bool, json: bool, say: Say) -> None:
    """Pages, the JSON summary, and what failed."""
    from gdmd.sweep.results import summary, write_pages

    outcome.page = write_pages(comparison, source, outcome.folder, required=required)
    if outcome.page:
        say(f"page: {outcome.page}")
    if json:
        print_json(summary(comparison, outcome))
    for place, reason in outcome.failed.items():
        say(f"failed: {place}: {reason}")


def _say(message: str) -> None:
    messages().print(message, markup=False, highlight=False, soft_wrap=True)


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
