"""Evaluations side by side on a terminal: a column per sampler, so that it fits in 80 characters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gdmd.shapes.grammar import TASKS

TITLES = {"single_object": "single object", "two_object": "two objects", "color_attr": "attribute binding"}
Line = tuple[str, tuple[str, ...], str]
"""(title, place in an evaluation's JSON, format)."""


def print_table(
    rows: Mapping[str, Mapping[str, Any]], trained: Collection[str], console: Console | None = None
) -> None:
    """Print evaluations (name -> ``Evaluation.json()``); ``trained`` marks the rewards the students were trained on."""
    console = console or Console()
    table = Table(title="Shapes lab, fixed evaluation set", title_justify="left", pad_edge=False, box=box.SIMPLE)
    table.add_column("", no_wrap=True, min_width=21)
    for name in rows:
        table.add_column(name, justify="right", max_width=11)
    for section in _sections(rows, trained):
        for title, place, form in section:
            table.add_row(title, *(_cell(row, place, form) for row in rows.values()))
        table.add_section()
    console.print(table)
    console.print(
        "* trained on; all other measures are unseen in training. NFE: network calls per image.", markup=False
    )


def _sections(rows: Mapping[str, Mapping[str, Any]], trained: Collection[str]) -> list[list[Line]]:
    tasks: list[Line] = [(f"  {TITLES.get(task, task)}", ("shapeseval", task), ".3f") for task in TASKS]
    names = dict.fromkeys(name for row in rows.values() for name in row["rewards"])
    scores: list[Line] = [
        (name + (" *" if name in trained else ""), ("rewards", name), ".3f")
        for name in sorted(names, key=lambda name: name not in trained)
    ]
    return [
        [("ShapesEval overall", ("shapeseval", "overall"), ".3f"), *tasks],
        [*scores, ("fidelity", ("fidelity",), ".3f"), ("coverage", ("coverage",), ".3f")],
        [
            ("NFE", ("nfe",), "d"),
            ("images/s, sampler", ("images_per_s",), ".0f"),
            ("images/s, with decode", ("images_per_s_decoded",), ".0f"),
        ],
    ]


def _cell(row: Mapping[str, Any], place: tuple[str, ...], form: str) -> str:
    """What was not measured reads "-"."""
    value: Any = row
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return "-" if value is None else format(value, form)
