"""Number formats and the three forms of a table."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from gdmd.reporting.tables import (
    Cell,
    Measure,
    Table,
    best_of,
    difference,
    estimate,
    interval,
    number,
    p_value,
    plus_minus,
    texts,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.59), "0.590"),
        (number(12345.6, 0), "12,346"),
        (number(None), "-"),
        (number(math.nan), "-"),
        (plus_minus(0.644, 0.02), "0.644 +- 0.020"),
        (plus_minus(0.644, math.nan), "0.644"),
        (plus_minus(None, 0.02), "-"),
        (interval(0.6244, 0.6635), "[0.624, 0.663]"),
        (interval(math.nan, math.nan), "-"),
        (estimate(0.644, 0.624, 0.664), "0.644 [0.624, 0.664]"),
        (estimate(0.644, None, None), "0.644"),
        (difference(0.056, 0.033, 0.079), "+0.056 [+0.033, +0.079]"),
        (difference(-0.056, -0.1, 0.02, 2), "-0.06 [-0.10, +0.02]"),
        (difference(None, 0.1, 0.2), "-"),
        (p_value(0.0421), "0.042"),
        (p_value(0.00099), "< 0.001"),
    ],
)
def test_number_formats(text: str, expected: str) -> None:
    assert text == expected


def test_measure_reads_nested_records() -> None:
    measure = Measure("clip", ("rewards", "clip"))
    assert measure.of({"rewards": {"clip": 1}}) == 1.0
    assert measure.of({"rewards": {"clip": None}}) is measure.of({"rewards": None}) is measure.of({}) is None


def test_best_of() -> None:
    assert (best_of([1.0, None, 3.0], 1), best_of([1.0, math.nan, 3.0], -1)) == (3.0, 1.0)
    assert best_of([1.0, 3.0], 0) is best_of([2.0, 2.0], 1) is best_of([None, 2.0], 1) is None


def test_one_table_in_three_forms() -> None:
    table = Table(["", "a|b [x]"], [[[Cell("ours"), Cell("0.6", best=True)]], [texts("theirs", "0.5")]])
    assert str(table) == "|  | a\\|b [x] |\n| :-- | --: |\n| ours | **0.6** |\n| theirs | 0.5 |\n"
    assert table.data() == {
        "columns": ["", "a|b [x]"],
        "rows": [
            [{"text": "ours", "best": False}, {"text": "0.6", "best": True}],
            [{"text": "theirs", "best": False}, {"text": "0.5", "best": False}],
        ],
    }
    console = Console(width=40, record=True)
    console.print(table.rich("title"))
    text = console.export_text()
    assert "a|b [x]" in text and "title" in text and text.index("ours") < text.index("theirs")
    assert table and not Table(["a"], []) and str(Table(["a"], [[]])) == ""
