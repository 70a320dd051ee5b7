"""Shapes evaluations side by side on a terminal of 80 columns: a column per sampler."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rich.console import Console

from gdmd.reporting.tables import Cell, Measure, Table, number
from gdmd.shapes.evaluate import CHECKED
from gdmd.shapes.grammar import TASKS

TITLES = {"single_object": "single object", "two_object": "two objects", "color_attr": "attribute binding"}
WIDTH = 11
"""Characters of a sampler's column."""


def print_table(rows: Mapping[str, Mapping[str, Any]], trained: Collection[str]) -> None:
    """Print evaluations (name -> ``Evaluation.json()``); ``trained`` rewards are marked with *."""
    console = Console()
    sections = [
        [[Cell(one.title), *(Cell(number(one.of(row), one.digits)) for row in rows.values())] for one in section]
        for section in _sections(rows, trained)
    ]
    console.print(Table(["", *rows], sections).rich("Shapes, fixed evaluation set", width=WIDTH))
    console.print("* used in training; all other measures are unseen. NFE: network calls per image.", markup=False)


def _sections(rows: Mapping[str, Mapping[str, Any]], trained: Collection[str]) -> list[list[Measure]]:
    names = dict.fromkeys(name for row in rows.values() for name in row["rewards"])
    checked = " *" * (CHECKED in trained)
    ordered = sorted(names, key=lambda name: name not in trained)
    return [
        [
            Measure(f"ShapesEval overall{checked}", ("shapeseval", "overall")),
            *(Measure(f"  {TITLES.get(task, task)}{checked}", ("shapeseval", task)) for task in TASKS),
        ],
        [
            *(Measure(name + (" *" if name in trained else ""), ("rewards", name)) for name in ordered),
            Measure("render fidelity", ("fidelity",)),
            Measure("attribute coverage", ("coverage",)),
        ],
        [
            Measure("NFE", ("nfe",), digits=0),
            Measure("images/s, sampler", ("images_per_s",), digits=0),
            Measure("images/s, with decode", ("images_per_s_decoded",), digits=0),
        ],
    ]
