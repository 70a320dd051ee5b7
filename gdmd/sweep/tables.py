"""Tables of a sweep from the lines of its table file. Numbers are means over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gdmd.reporting.statistics import PairedTest, Summary, holm, paired_t, summarize
from gdmd.reporting.tables import (
    MISSING,
    Cell,
    Measure,
    Place,
    Table,
    best_of,
    difference,
    interval,
    number,
    p_value,
    plus_minus,
    texts,
    value_at,
)
from gdmd.shapes.evaluate import HELDOUT
from gdmd.shapes.grammar import TASKS

Line = Mapping[str, Any]
"""A line of table.jsonl."""
OVERALL: Place = ("shapeseval",)
TRAINED_MARK = " †"


@dataclass(frozen=True)
class Row:
    """A row. kind: teacher | baseline | gdmd | control | exported; tables: strategy, collection or both."""

    name: str
    title: str
    kind: str
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """The lines of one sweep, its rows in order, and the row against which the others are tested."""

    rows: Sequence[Row]
    lines: Sequence[Line]
    headline: str

    def runs(self, name: str, budget: str = "updates") -> dict[int, Line]:
        """seed -> line."""
        own = (line for line in self.lines if (line["method"], line["budget"]) == (name, budget))
        return {line["seed"]: line for line in own}

    def values(self, name: str, place: Place, budget: str = "updates") -> dict[int, float]:
        """seed -> number; seeds without a value (null) are left out."""
        found = {seed: value_at(line, place) for seed, line in self.runs(name, budget).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def summary(self, name: str, place: Place, budget: str = "updates") -> Summary | None:
        """Statistics over the seeds; None if nothing was measured."""
        values = self.values(name, place, budget)
        return summarize(list(values.values())) if values else None

    def present(self, budget: str = "updates", keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
        """The rows that have a finished run under this budget, if ``keep`` holds for them."""
        measured = {line["method"] for line in self.lines if line["budget"] == budget}
        return [row for row in self.rows if row.name in measured and keep(row)]

    def title(self, name: str) -> str:
        """The title of a row."""
        return next(row.title for row in self.rows if row.name == name)

    @property
    def trained(self) -> list[str]:
        """The rewards that the headline row was trained on; those of any row while it has none."""
        own = [line for line in self.lines if line["method"] == self.headline and line.get("trained")] or self.lines
        return list(dict.fromkeys(name for line in own for name in line.get("trained", ())))

    def foreign(self, name: str) -> list[str]:
        """Rewards that this row was trained on and the headline row was not: they are not unseen measures for it."""
        return [reward for reward in self.seen(name) if reward not in self.trained]

    def seen(self, name: str) -> list[str]:
        """Rewards that this row was trained on."""
        own = (line for line in self.lines if line["method"] == name)
        return list(dict.fromkeys(reward for line in own for reward in line.get("trained", ())))

    @property
    def rewards(self) -> list[str]:
        """All measured rewards, the trained ones first."""
        names = dict.fromkeys(name for line in self.lines for name in line["rewards"])
        return sorted(names, key=lambda name: (name not in self.trained, name))


def quality(results: Results) -> list[Measure]:
    """Table 1: ShapesEval, rewards (trained on: †), fidelity, coverage, diversity, Fréchet distance, NFE."""
    rewards = [Measure(_reward_title(results, name), ("rewards", name)) for name in results.rewards]
    return [
        Measure("ShapesEval", OVERALL),
        *rewards,
        Measure("fidelity", ("fidelity",)),
        Measure("coverage", ("coverage",)),
        Measure("diversity", ("diversity",), 0),
        Measure("Fréchet", ("frechet",), -1),
        Measure("NFE", ("nfe",), 0, 0),
    ]


def by_task() -> list[Measure]:
    """Table 2: ShapesEval by task."""
    tasks = [Measure(task.replace("_", " "), ("tasks", task)) for task in TASKS]
    return [Measure("overall", OVERALL), *tasks]


def costs() -> list[Measure]:
    """What a training and an image cost."""
    return [
        Measure("student updates", ("student_updates",), 0, 0),
        Measure("iterations", ("steps",), 0, 0),
        Measure("passes, thousands", ("passes",), 0, 1, 1e-3),
        Measure("seconds", ("seconds",), 0, 0),
        Measure("peak memory, MiB", ("peak_memory_mib",), 0, 0),
        Measure("images/s", ("images_per_s",), 0, 0),
    ]


def weight_statistics() -> list[Measure]:
    """Statistics of the optimality weights over the second half of training."""
    return [
        Measure("mean r", ("statistics", "weight/r_mean"), 0),
        Measure("std of r", ("statistics", "weight/r_std"), 0),
        Measure("share r < 1/2", ("statistics", "weight/share_below_half"), 0),
        Measure("share clipped", ("statistics", "weight/share_clipped"), 0),
        Measure("mean weight w", ("statistics", "weight/mean"), 0),
        Measure("gain R(target) - R(x0)", ("statistics", "reward/gain"), 0),
    ]


def table(results: Results, rows: Sequence[Row], measures: Sequence[Measure], budget: str = "updates") -> Table:
    """Mean +- std per row and measure; columns without any value are left out.

    The best student of a column, of those trained on the same rewards as the headline row, is marked.
    """
    known = [m for m in measures if any(results.summary(row.name, m.place, budget) for row in rows)]
    best = [_best(results, rows, m, budget) for m in known]
    body = [
        [Cell(row.title), *(_cell(results, row, m, budget, top) for m, top in zip(known, best, strict=True))]
        for row in rows
    ]
    return Table(["", *(m.title for m in known)], [body])


@dataclass(frozen=True)
class AgainstHeadline:
    """One row against the headline row: headline - row, paired over seeds."""

    row: Row
    test: PairedTest
    adjusted: float  # p after Holm's correction over all rows


def against_headline(results: Results, place: Place, budget: str = "updates") -> list[AgainstHeadline]:
    """Paired tests of every other row with at least two common seeds; this list is the family of Holm's correction."""
    own = results.values(results.headline, place, budget)
    tests: dict[str, PairedTest] = {}
    for row in results.rows:
        if row.name == results.headline or (row.kind != "teacher" and not results.runs(row.name, budget)):
            continue
        same = "updates" if row.kind == "teacher" else budget  # a teacher has no budget
        if found := paired_t(own, results.values(row.name, place, same)):
            tests[row.name] = found
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    return [AgainstHeadline(row, tests[row.name], adjusted[row.name]) for row in results.rows if row.name in tests]


def significance(results: Results, place: Place, budget: str = "updates") -> Table:
    """Mean, std and interval of every row, and the paired test of the headline row against it."""
    tests = {each.row.name: each for each in against_headline(results, place, budget)}
    body = []
    for row in results.rows:
        found = results.summary(row.name, place, budget)
        if found is None and row.name in tests:
            found = results.summary(row.name, place)
        if found is not None:
            cells = texts(str(found.count), plus_minus(found.mean, found.std), interval(found.low, found.high))
            title = Cell(row.title, best=row.name == results.headline)
            body.append([title, *cells, *_test_cells(tests.get(row.name))])
    name = results.title(results.headline)
    return Table(["", "seeds", "mean", "95 % interval", f"{name} - row", "t", "p", "p (Holm)"], [body])


def brief_significance(results: Results, budget: str = "updates") -> Table:
    """Differences from the headline row on the measures that no row is trained on, with Holm's p in parentheses."""
    measures = {HELDOUT: ("rewards", HELDOUT), "fidelity": ("fidelity",), "coverage": ("coverage",)}
    found = {
        name: {each.row.name: each for each in against_headline(results, place, budget)}
        for name, place in measures.items()
    }
    rows = [row for row in results.rows if any(row.name in own for own in found.values())]
    body = [[Cell(row.title), *(_brief(found[name].get(row.name)) for name in measures)] for row in rows]
    return Table(["", *measures], [body])


def _test_cells(found: AgainstHeadline | None) -> list[Cell]:
    if found is None:
        return texts("", "", "", "")
    test = found.test
    shown = difference(test.difference, test.low, test.high)
    return texts(shown, number(test.t, 2), p_value(test.p), p_value(found.adjusted))


def _brief(found: AgainstHeadline | None) -> Cell:
    text = MISSING if found is None else f"{number(found.test.difference, signed=True)} ({p_value(found.adjusted)})"
    return Cell(text)


def _cell(results: Results, row: Row, measure: Measure, budget: str, best: float | None) -> Cell:
    found = results.summary(row.name, measure.place, budget)
    if found is None:
        return Cell()
    mean, std = found.mean * measure.scale, found.std * measure.scale
    text = plus_minus(mean, std, measure.digits) if measure.best else number(mean, measure.digits)
    return Cell(text, best=found.mean == best and _competes(results, row))


def _best(results: Results, rows: Sequence[Row], measure: Measure, budget: str) -> float | None:
    found = [results.summary(row.name, measure.place, budget) for row in rows if _competes(results, row)]
    return best_of([each and each.mean for each in found], measure.best)


def _competes(results: Results, row: Row) -> bool:
    """Whether a row may be the best: a student that was trained on no measure that is unseen for the headline row."""
    return row.kind != "teacher" and not results.foreign(row.name)


def _reward_title(results: Results, name: str) -> str:
    return name + (TRAINED_MARK if name in results.trained else "")
