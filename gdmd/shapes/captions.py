"""The training captions of the Shapes world."""

from __future__ import annotations

from gdmd.shapes.grammar import TASKS, catalog


def training_captions() -> list[list[str]]:
    """Captions of the train split, one list per task."""
    table = catalog()
    return [[table.captions[row].text for row in table.rows("train", task).tolist()] for task in range(len(TASKS))]
