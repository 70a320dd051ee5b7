"""Parts of a page: positions of a dot plot, its ticks, digits of a number."""

from __future__ import annotations

import math

import pytest

from gdmd.reporting.pages import Dot, Number, Verdict, digits_for, dot_plot, render


@pytest.mark.parametrize(
    "values", [(0.0, 1.0), (0.577, 0.3), (-0.133, 0.26), (0.28, 0.283), (21.5, 21.9), (5, 5), (0, 0), (40, 9000)]
)
def test_dots_lie_inside_their_axis(values: tuple[float, float]) -> None:
    plot = dot_plot("x", [Dot("a", "#000", value, value - 0.01, value + 0.01) for value in values], reference=0.0)
    assert plot is not None and plot.reference is not None
    positions = [end for _, place, start, width in plot.rows for end in (place, start, start + width)]
    assert all(0 <= place <= 100 for place in (*positions, *(place for place, _ in plot.ticks), plot.reference))
    assert 1 <= len(plot.ticks) <= 6 and len({text for _, text in plot.ticks}) == len(plot.ticks)


def test_dots_without_an_interval_or_a_mean() -> None:
    plot = dot_plot("x", [Dot("a", "#000", 1.0), Dot("b", "#000", math.nan)])
    assert plot is not None and [width for *_, width in plot.rows] == [0]
    assert dot_plot("x", [Dot("b", "#000", math.nan)]) is None


def test_digits_show_the_interval() -> None:
    assert [digits_for([half]) for half in (0.2, 0.02, 0.002, 0.0002, 0, math.nan)] == [3, 3, 4, 5, 3, 3]


def test_a_page_without_a_value_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        render("evaluation/report.html.jinja", title="x", verdict=Verdict("y", [Number("a", "b")]))
