"""The measures of a Shapes run for its report: one table and dot plots with intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from gdmd.evaluation.table import TITLES
from gdmd.evaluation.verdict import captions_of, is_teacher, paired, scores_of, task_mean
from gdmd.reporting.pages import Dot, DotPlot, Group, TableRow, dot_plot
from gdmd.reporting.plots import colors_of
from gdmd.reporting.tables import Cell, Measure, best_of, difference, estimate, number, value_at
from gdmd.shapes.evaluate import CHECKED
from gdmd.shapes.grammar import TASKS

Rows = Mapping[str, Mapping[str, Any]]
"""Row name -> ``Evaluation.json()``."""


def measure_groups(rows: Rows, trained: Collection[str]) -> list[Group]:
    """The table: what no reward saw, what the student was trained on, what images cost."""
    rewards = dict.fromkeys(name for row in rows.values() for name in row.get("rewards", {}))
    checker = [
        Measure("ShapesEval", ("shapeseval", "overall"), 1),
        *(Measure(f"ShapesEval {TITLES.get(task, task)}", ("shapeseval", task), 1) for task in TASKS),
    ]
    unseen = [
        *(() if CHECKED in trained else checker),
        *(Measure(name, ("rewards", name), 1) for name in rewards if name not in trained),
        Measure("render fidelity", ("fidelity",), 1),
        Measure("attribute coverage", ("coverage",), 1),
        Measure("diversity within a caption", ("diversity",), 0),
        Measure("Fréchet distance (lower is better)", ("frechet",), -1),
    ]
    rewarded = [Measure(name, ("rewards", name), 1) for name in rewards if name in trained]
    rewarded = [*(checker if CHECKED in trained else ()), *rewarded]
    costs = [
        Measure("network calls per image (NFE)", ("nfe",), 0, 0),
        Measure("images/s", ("images_per_s",), 1, 1),
        Measure("images/s with decoding", ("images_per_s_decoded",), 1, 1),
    ]
    titled = (
        ("Unseen in training", "unseen", unseen),
        ("Trained on: a gain proves little", "trained", rewarded),
        ("Cost, on this machine at one batch size", "", costs),
    )
    return [Group(title, [_row(rows, m) for m in own], mark) for title, mark, own in titled if own and rows]


def _row(rows: Rows, measure: Measure) -> TableRow:
    values = [measure.of(row) for row in rows.values()]
    top = best_of(values, measure.best)
    texts = [
        estimate(value, *_ends(row, measure.place), measure.digits)
        for value, row in zip(values, rows.values(), strict=True)
    ]
    return TableRow(
        measure.title, [Cell(text, v is not None and v == top) for text, v in zip(texts, values, strict=True)]
    )


def _ends(row: Mapping[str, Any], path: tuple[str, ...]) -> tuple[float | None, float | None]:
    """The interval of a part of ShapesEval; (None, None) where none is known."""
    if path == ("shapeseval", "overall"):
        low, high = row.get("interval") or (None, None)
        return low, high
    if path[0] == "shapeseval" and path[1] in (scores := scores_of(row)):
        found = task_mean({path[1]: scores[path[1]]}, captions_of(row))
        return (None, None) if found.low == found.high else (found.low, found.high)  # all right or all wrong: unknown
    return None, None


def measure_plots(rows: Rows) -> list[DotPlot]:
    """Differences of the student from every other row, then ShapesEval and its tasks."""
    names = list(rows)
    color = dict(zip(names, colors_of(names), strict=True))
    plots = []
    if students := [name for name in rows if not is_teacher(name)]:
        own = students[-1]
        found = {name: paired(rows[own], rows[name]) for name in names if name != own}
        dots = [
            Dot(f"minus {name}", color[name], one.mean, one.low, one.high, difference(one.mean, one.low, one.high))
            for name, one in found.items()
            if one is not None
        ]
        note = "Paired by caption and noise; right of the dashed line the student is better."
        plots.append(dot_plot(f"ShapesEval of {own}", dots, 0.0, note))
    for task in ("overall", *TASKS):
        path = ("shapeseval", task)
        dots = []
        for name, row in rows.items():
            ends = tuple(math.nan if end is None else end for end in _ends(row, path))
            value = value_at(row, path)
            dots.append(Dot(name, color[name], math.nan if value is None else value, *ends, number(value)))
        plots.append(dot_plot(f"ShapesEval {TITLES.get(task, task)}", dots))
    return [plot for plot in plots if plot]
