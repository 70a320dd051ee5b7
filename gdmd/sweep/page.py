"""shapes.md and shapes.html: the pages of a sweep, from its table and its figures. Both show the same sections."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gdmd.config.describe import counted
from gdmd.config.names import listed
from gdmd.io import write_atomic
from gdmd.reporting.pages import Dot, DotPlot, Number, Verdict, data_uri, dot_plot, render
from gdmd.reporting.tables import MISSING, Table, difference, number, plus_minus
from gdmd.shapes.evaluate import CHECKED, HELDOUT
from gdmd.shapes.same_noise import read_same_noise
from gdmd.sweep.figures import FIGURES, row_colors
from gdmd.sweep.tables import (
    OVERALL,
    AgainstHeadline,
    Results,
    Row,
    against_headline,
    brief_significance,
    by_task,
    costs,
    quality,
    significance,
    table,
    weight_statistics,
)

LEVEL = 0.05
"""Corrected p below which a difference is claimed."""


@dataclass(frozen=True)
class About:
    """What the page says about how the sweep was run."""

    title: str
    about: str
    command: str
    beginning: str  # where the students start, and how many updates they take
    seeds: Sequence[int]
    reference: str  # title of the row whose passes are the second budget; "" without that budget
    split: str
    images: int  # per run
    missing: int = 0  # runs that are not in the table
    others: str = ""  # the part of the sentence on seeds that names rows with other seeds


@dataclass(frozen=True)
class Section:
    """A heading, and below it paragraphs, tables and lists of sentences. ** marks bold text."""

    title: str
    parts: Sequence[str | Table | tuple[str, ...]]


def write_page(path: Path, results: Results, about: About, figures: Sequence[str]) -> Path:
    """Write the Markdown to ``path`` and the HTML next to it; ``figures``: names of the files in figures/."""
    sections = [*_tables(results), *_matched(results, about), _cost(results)]
    shown = [(name, *FIGURES[name]) for name in FIGURES if name in figures]
    write_atomic(path, _markdown(results, about, sections, shown), "the page")
    write_atomic(path.with_suffix(".html"), _html(path.parent, results, about, sections, shown), "the page")
    return path


def verdict(results: Results) -> Verdict:
    """The headline row against the teachers and baselines, after Holm's correction over all rows."""
    name = results.title(results.headline)
    own = results.summary(results.headline, OVERALL)
    teacher = next((row.name for row in results.present() if row.kind == "teacher"), None)
    tests = [e for e in against_headline(results, OVERALL) if e.row.kind == "baseline" or e.row.name == teacher]
    if own is None or not tests:
        return Verdict(f"{name} cannot be compared yet: paired tests need two seeds of it and of another row.")
    words = {1: "is better than", -1: "is worse than", 0: "is not distinguishable from"}
    found = {text: [quoted(e.row.title) for e in tests if _sign(e) == sign] for sign, text in words.items()}
    parts = [f"{text} {listed(rows, quoted=False, last='and')}" for text, rows in found.items() if rows]
    first = tests[0]
    other = results.summary(first.row.name, OVERALL)
    numbers = [
        Number(f"ShapesEval of {name}", plus_minus(own.mean, own.std)),
        Number(f"ShapesEval of {first.row.title}", plus_minus(other.mean, other.std) if other else MISSING),
        Number(
            f"difference, paired over {first.test.count} seeds",
            difference(first.test.difference, first.test.low, first.test.high),
        ),
    ]
    note = (
        "+-: standard deviation over seeds. Brackets: 95 % t interval. Better or worse: p below 0.05 in a paired t test, "
        "after Holm's correction over all rows of the table."
    )
    few, most = (pick(each.test.count for each in tests) for pick in (min, max))  # the seeds that both rows have
    seeds = f"{most} seeds" if few == most else f"{few} to {most} common seeds"
    return Verdict(f"On ShapesEval over {seeds}, {name} {'; it '.join(parts)}.", numbers, [note])


def quoted(title: str) -> str:
    """A title as an item of a list: in quotes if it contains a comma."""
    return f'"{title}"' if "," in title else title


def _sign(each: AgainstHeadline) -> int:
    if each.adjusted >= LEVEL:
        return 0
    return 1 if each.test.difference > 0 else -1


# ---------------------------------------------------------------- sections


def _introduction(results: Results, about: About) -> list[str]:
    parts = [*about.about.split("\n\n")] if about.about else []
    if about.missing:
        parts.append(f"**Unfinished: {about.missing} runs are not in the table yet.**")
    seeds = f"{counted(len(about.seeds), 'seed')} ({', '.join(map(str, about.seeds))})"
    parts.append(
        f"{about.beginning} A number is the mean over {seeds} of {about.images:,} images each "
        f"({about.split} captions, EMA weights){about.others}; +- is the standard deviation over seeds. † marks "
        f"rewards that students were trained on; **everything else is unseen in training**: {', '.join(_unseen(results))}. "
        "The best student of a column is emphasized."
    )
    return [*parts, *_foreign(results)]


def _instead(results: Results, row: Row) -> str:
    """Whether a row's other rewards replaced those of the headline row or were added to them."""
    return "too" if {*results.trained} <= {*results.seen(row.name)} else "instead"


def _unseen(results: Results) -> list[str]:
    """The measures that the headline row was not trained on. A reward that is a part of the checker shows ShapesEval."""
    known = {CHECKED: "the checker behind ShapesEval", HELDOUT: "the held-out scorer"}
    return [*(text for name, text in known.items() if name not in results.trained), "fidelity", "coverage"]


def _foreign(results: Results) -> list[str]:
    """A sentence on the rows that were trained on other rewards than the headline row; none without such rows."""
    rows = [(row, results.foreign(row.name)) for row in results.present()]
    listed = "; ".join(
        f"**{row.title}** was trained on {', '.join(names)} {_instead(results, row)}" for row, names in rows if names
    )
    if not listed:
        return []
    checker = " (a part of the checker, so that its ShapesEval is not unseen either)" if CHECKED in listed else ""
    return [f"{listed}{checker}: the row shows what that reward is worth and is never the best."]


def _tables(results: Results) -> list[Section]:
    students = results.present(keep=lambda row: row.kind != "control")
    strategy = results.present(keep=lambda row: "strategy" in row.tables)
    collection = results.present(keep=lambda row: "collection" in row.tables)
    controls = results.present(keep=lambda row: row.kind == "control" or row.name == results.headline)
    sections = [
        Section(
            f"ShapesEval overall: is {results.title(results.headline)} better?",
            (_TESTS, significance(results, OVERALL), _UNSEEN, brief_significance(results)),
        ),
        Section("Table 1: quality", (table(results, students, quality(results)),)),
        Section("Table 2: ShapesEval by task", (table(results, students, by_task()),)),
    ]
    if strategy:
        sections.append(Section("Table 3: how the reward is used", (table(results, strategy, quality(results)),)))
    if collection:
        sections.append(
            Section("Table 4: how gradients are collected", (table(results, collection, quality(results)),))
        )
    if len(controls) > 1:
        sections.append(Section("Controls", (_CONTROLS, table(results, controls, quality(results)))))
    return sections


_TESTS = (
    "Two-sided paired t tests over the seeds that both rows have (a seed fixes the noise of weights, the prompts and the "
    "evaluation noise of all rows), 95 % t intervals, p corrected by Holm's method over all rows of the table."
)
_UNSEEN = "The same differences on measures that no method is trained on (corrected p in parentheses):"
_CONTROLS = (
    "A constant weight is close to a change of the learning rate, so a gain counts only if it disappears together with the "
    "scores: gamma = 0 in the same loop, scores (and the reward gradient, where a row uses it) shuffled within the batch, r "
    "constant, and a step of weight 1[r > 1/2]."
)


def _matched(results: Results, about: About) -> list[Section]:
    rows = results.present("passes")
    if not rows or not about.reference:
        return []
    text = (
        f"Every row is trained until it has made as many network passes as {about.reference} under the budget above "
        "(counted by hooks; a backward pass counts two forwards)."
    )
    measures = [*by_task()[:1], *quality(results)[1:-1], *costs()[:3]]
    tables = (significance(results, OVERALL, "passes"), brief_significance(results, "passes"))
    return [Section("The same compute", (text, *tables, table(results, rows, measures, "passes")))]


def _cost(results: Results) -> Section:
    students = results.present(keep=lambda row: row.kind != "teacher")
    weighted = [row for row in students if results.summary(row.name, ("statistics", "weight/r_mean"))]
    text = (
        "Passes: forward passes of a denoiser (student, fake score, teacher, old policy) on one sample, a backward counts "
        "two; decoder and rewards are not counted. Seconds: inside iterations, one CPU thread or one GPU per run."
    )
    parts: list[str | Table] = [text, table(results, students, costs())]
    if weighted:
        parts += ["The weights over the second half of training:", table(results, weighted, weight_statistics())]
    return Section("Cost per method", parts)


def _provenance(results: Results) -> tuple[str, ...]:
    runs = {line["hash"]: line for line in results.lines}
    hours = sum(line.get("cell_seconds", 0) for line in runs.values()) / 3600
    unseen = ", ".join(name for name in results.rewards if name not in results.trained)
    return (
        f"{len(results.lines)} lines of the table, {len(runs)} trainings and evaluations, {hours:.1f} hours of one worker.",
        f"Commit {_values(results, 'commit')}; torch {_values(results, 'torch')}; on {_values(results, 'device')}.",
        f"Trained on {', '.join(results.trained) or 'no reward'}; also measured on {unseen} ({HELDOUT} has another "
        "architecture).",
        "The `command` of a line of the table repeats its run; its `hash` is that of recipe, evaluation and budget.",
    )


def _values(results: Results, key: str) -> str:
    found: Mapping[str, None] = dict.fromkeys(str(line[key])[:48] for line in results.lines if line.get(key))
    return ", ".join(found) or "unknown"


# ---------------------------------------------------------------- the two pages


def _markdown(
    results: Results, about: About, sections: Sequence[Section], figures: Sequence[tuple[str, str, str]]
) -> str:
    answer = verdict(results)
    head = [f"# {about.title}", f"**{answer.sentence}**"]
    if answer.numbers:
        head += ["\n".join(f"- {one.label}: {one.value}" for one in answer.numbers), *answer.notes]
    blocks = [*head, *_introduction(results, about)]
    for section in sections:
        blocks += [f"## {section.title}", *(_block(part) for part in section.parts)]
    if figures:
        blocks.append("## Figures")
        blocks += [f"### {title}\n\n![{title}](figures/{name})\n\n{text}" for name, title, text in figures]
    blocks += ["## How to repeat it", f"```\n{about.command}\n```", _block(_provenance(results))]
    return "\n\n".join(block.strip("\n") for block in blocks if block) + "\n"


def _block(part: str | Table | tuple[str, ...]) -> str:
    return "\n".join(f"- {line}" for line in part) if isinstance(part, tuple) else str(part)


def _html(
    folder: Path,
    results: Results,
    about: About,
    sections: Sequence[Section],
    figures: Sequence[tuple[str, str, str]],
) -> str:
    galleries, drawn = [], []
    for name, title, text in figures:
        path = folder / "figures" / name
        if images := read_same_noise(path):
            galleries.append((title, text, images))
        else:
            drawn.append((title, text, data_uri(path.read_bytes())))
    return render(
        "sweep/page.html.jinja",
        about=about,
        verdict=verdict(results),
        introduction=[text.replace("**", "") for text in _introduction(results, about)],
        plots=_plots(results),
        galleries=galleries,
        sections=sections,
        figures=drawn,
        provenance=_provenance(results),
    )


def _plots(results: Results) -> list[DotPlot]:
    """ShapesEval of every row, and the difference of the headline row to it."""
    colors = row_colors(results)
    dots = []
    for row in results.present():
        if found := results.summary(row.name, OVERALL):
            dots.append(Dot(row.title, colors[row.name], found.mean, found.low, found.high, number(found.mean)))
    tests = [
        Dot(
            each.row.title,
            colors[each.row.name],
            each.test.difference,
            each.test.low,
            each.test.high,
            difference(each.test.difference, each.test.low, each.test.high),
        )
        for each in against_headline(results, OVERALL)
        if not math.isnan(each.test.low)
    ]
    name = results.title(results.headline)
    found = [
        dot_plot("ShapesEval, mean over seeds", dots),
        dot_plot(f"{name} minus each row, paired over seeds", tests, 0.0),
    ]
    return [plot for plot in found if plot]
