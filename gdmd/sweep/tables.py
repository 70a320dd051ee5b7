"""Tables of a comparison from the lines of its table file, as Markdown. Numbers are means over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gdmd.reporting.statistics import PairedTest, Summary, holm, paired_t, summarize
from gdmd.shapes.evaluate import HELDOUT
from gdmd.shapes.grammar import TASKS

Line = Mapping[str, Any]
"""A line of table.jsonl."""
Place = tuple[str, ...]
OVERALL: Place = ("shapeseval",)
TRAINED_MARK = " †"


@dataclass(frozen=True)
class Row:
    """A row of the tables. kind: teacher | rival | gdmd | control; tables: strategy and collection where it belongs."""

    name: str
    title: str
    kind: str
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """The lines of one comparison, its rows in order, and the row against which the others are tested."""

    rows: Sequence[Row]
    lines: Sequence[Line]
    headline: str

    def cells(self, name: str, budget: str = "updates") -> dict[int, Line]:
        """seed -> line."""
        own = (line for line in self.lines if (line["method"], line["budget"]) == (name, budget))
        return {line["seed"]: line for line in own}

    def values(self, name: str, place: Place, budget: str = "updates") -> dict[int, float]:
        """seed -> number; seeds where it was not measured (null) are left out."""
        found = {seed: number_at(line, place) for seed, line in self.cells(name, budget).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def summary(self, name: str, place: Place, budget: str = "updates") -> Summary | None:
        """Over the seeds; None where nothing was measured."""
        values = self.values(name, place, budget)
        return summarize(list(values.values())) if values else None

    def present(self, budget: str = "updates", keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
        """The rows that have a finished cell under this budget."""
        measured = {line["method"] for line in self.lines if line["budget"] == budget}
        return [row for row in self.rows if row.name in measured and keep(row)]

    def title(self, name: str) -> str:
        """What a reader sees."""
        return next(row.title for row in self.rows if row.name == name)

    @property
    def trained(self) -> list[str]:
        """The rewards that the headline row was trained on (any row's, while it is not finished)."""
        own = [line for line in self.lines if line["method"] == self.headline] or self.lines
        return list(dict.fromkeys(name for line in own for name in line.get("trained", ())))

    def foreign(self, name: str) -> list[str]:
        """Rewards that this row was trained on and the headline row was not: what is no unseen measure of it."""
        own = (line for line in self.lines if line["method"] == name)
        return [
            reward
            for reward in dict.fromkeys(r for line in own for r in line.get("trained", ()))
            if reward not in self.trained
        ]

    @property
    def rewards(self) -> list[str]:
        """All measured rewards, the trained ones first."""
        names = dict.fromkeys(name for line in self.lines for name in line["rewards"])
        return sorted(names, key=lambda name: (name not in self.trained, name))


@dataclass(frozen=True)
class Measure:
    """A column: higher or lower is better (+1, -1) or neither (0)."""

    title: str
    place: Place
    best: int = 1
    digits: int = 3
    scale: float = 1.0


def number_at(line: Line, place: Place) -> float | None:
    """The number at a place of a line; None where it was not measured."""
    found: Any = line
    for key in place:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def quality(results: Results) -> list[Measure]:
    """Table 1: what was trained on (†), what was not, fidelity, coverage, diversity."""
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
    """Table 2."""
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


def steering() -> list[Measure]:
    """What the weights of a method did, over the second half of its training."""
    return [
        Measure("mean r", ("statistics", "weight/r_mean"), 0),
        Measure("std of r", ("statistics", "weight/r_std"), 0),
        Measure("share r < 1/2", ("statistics", "weight/share_below_half"), 0),
        Measure("share clipped", ("statistics", "weight/share_clipped"), 0),
        Measure("mean weight w", ("statistics", "weight/mean"), 0),
        Measure("gain R(target) - R(x0)", ("statistics", "reward/gain"), 0),
    ]


def table(results: Results, rows: Sequence[Row], measures: Sequence[Measure], budget: str = "updates") -> str:
    """mean ± std per row and measure; the best student of a column, of those with the headline's rewards, is bold.

    Columns nobody has are left out.
    """
    known = [m for m in measures if any(results.summary(row.name, m.place, budget) for row in rows)]
    best = {m.title: _best(results, rows, m, budget) for m in known}
    head = ["", *(m.title for m in known)]
    body = [[row.title, *(_cell(results, row, m, budget, best[m.title]) for m in known)] for row in rows]
    return markdown(head, body)


@dataclass(frozen=True)
class Comparison:
    """One row against the headline row: headline - row, paired over seeds."""

    row: Row
    test: PairedTest
    adjusted: float  # p after Holm's correction over all rows


def against_headline(results: Results, place: Place, budget: str = "updates") -> list[Comparison]:
    """Paired tests of every other row with two or more common seeds; Holm's family is this list."""
    own = results.values(results.headline, place, budget)
    tests: dict[str, PairedTest] = {}
    for row in results.rows:
        same = budget if results.cells(row.name, budget) else "updates"  # a teacher has no budget
        found = (
            paired_t(own, results.values(row.name, place, same)) if row.kind == "teacher" or same == budget else None
        )
        if found is not None and row.name != results.headline:
            tests[row.name] = found
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    return [Comparison(row, tests[row.name], adjusted[row.name]) for row in results.rows if row.name in tests]


def significance(results: Results, place: Place, budget: str = "updates") -> str:
    """Mean, std and interval of every row, and the paired test of the headline row against it."""
    tests = {each.row.name: each for each in against_headline(results, place, budget)}
    rows = [row for row in results.rows if row.name in tests or results.cells(row.name, budget)]
    body = []
    for row in rows:
        found = results.summary(row.name, place, budget) or results.summary(row.name, place)
        if found is None:
            continue
        cells = [str(found.count), f"{found.mean:.3f}", _maybe(found.std), _interval(found.low, found.high)]
        title = f"**{row.title}**" if row.name == results.headline else row.title
        body.append([title, *cells, *_test_cells(tests.get(row.name))])
    name = results.title(results.headline)
    return markdown(["", "seeds", "mean", "std", "95 % interval", f"{name} - row", "t", "p", "p (Holm)"], body)


def brief_significance(results: Results, budget: str = "updates") -> str:
    """Differences to the headline row on the measures that nobody is trained on, with Holm's p in brackets."""
    measures = {HELDOUT: ("rewards", HELDOUT), "fidelity": ("fidelity",), "coverage": ("coverage",)}
    found = {
        name: {c.row.name: c for c in against_headline(results, place, budget)} for name, place in measures.items()
    }
    rows = [row for row in results.rows if any(row.name in own for own in found.values())]
    body = [[row.title, *(_brief(found[name].get(row.name)) for name in measures)] for row in rows]
    return markdown(["", *measures], body)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right; "" without rows."""
    if not body:
        return ""
    ruler = [":--", *("--:" for _ in head[1:])]
    lines = [head, ruler, *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _test_cells(found: Comparison | None) -> list[str]:
    if found is None:
        return ["", "", "", ""]
    test = found.test
    difference = f"{test.difference:+.3f} {_interval(test.low, test.high, '+.3f')}"
    return [difference, f"{test.t:.2f}", p_text(test.p), p_text(found.adjusted)]


def _brief(found: Comparison | None) -> str:
    return "–" if found is None else f"{found.test.difference:+.3f} ({p_text(found.adjusted)})"


def p_text(p: float) -> str:
    """Three digits, or that it is smaller."""
    return "< .001" if p < 0.001 else f"{p:.3f}"


def _cell(results: Results, row: Row, measure: Measure, budget: str, best: float | None) -> str:
    found = results.summary(row.name, measure.place, budget)
    if found is None:
        return "–"
    text = f"{found.mean * measure.scale:,.{measure.digits}f}"
    if measure.best and found.count > 1:
        text += f" ± {found.std * measure.scale:.{measure.digits}f}"
    is_best = best is not None and found.mean == best and _competes(results, row)
    return f"**{text}**" if is_best else text


def _best(results: Results, rows: Sequence[Row], measure: Measure, budget: str) -> float | None:
    found = [results.summary(row.name, measure.place, budget) for row in rows if _competes(results, row)]
    means = [each.mean for each in found if each is not None]
    if not measure.best or not means or min(means) == max(means):
        return None
    return max(means) if measure.best > 0 else min(means)


def _competes(results: Results, row: Row) -> bool:
    """Whether a row may be the best: a student that was not trained on a measure that is unseen for the headline."""
    return row.kind != "teacher" and not results.foreign(row.name)


def _reward_title(results: Results, name: str) -> str:
    return name + (TRAINED_MARK if name in results.trained else "")


def _interval(low: float, high: float, form: str = ".3f") -> str:
    return "–" if math.isnan(low) else f"[{low:{form}}, {high:{form}}]"


def _maybe(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
