"""The analysis of a study for readers: report.html (self-contained), report.md, the win-rate figure, and files for tools."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdmd.io import writing
from gdmd.reporting.pages import Dot, DotPlot, Group, Number, TableRow, Verdict, dot_plot, render
from gdmd.reporting.plots import INK, STYLE
from gdmd.reporting.tables import MISSING, Cell, Table, difference, p_value, texts
from gdmd.study.analyze import Analysis, PairResult
from gdmd.study.export import csv_text, jsonl_text
from gdmd.study.records import Vote
from gdmd.study.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINS, TIES, LOSSES = "#0072b2", "#8a8f98", "#d55e00"
"""Distinct for color-blind readers (after Okabe and Ito)."""
FIGURE_INK = "#1d1f24"
LEVEL = 0.05
"""p of the sign test from which on votes that all agree are too few."""
LABELS = {"overall": "Overall", "quality": "Visual quality", "alignment": "Prompt alignment"}


def write_report(analysis: Analysis, votes: Sequence[Vote], folder: Path) -> Path:
    """Write report.html, report.md, figure.svg, figure.png, figure.pdf, analysis.json, votes.csv and votes.jsonl."""
    with writing("the report", folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.html"
        path.write_text(html_text(analysis), encoding="utf-8")
        (folder / "report.md").write_text(markdown_text(analysis), encoding="utf-8")
        for suffix in ("svg", "png", "pdf"):
            (folder / f"figure.{suffix}").write_bytes(figure(analysis, suffix))
        text = json.dumps(analysis.json(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "analysis.json").write_text(text + "\n", encoding="utf-8")
        (folder / "votes.csv").write_text(csv_text(votes), encoding="utf-8")
        (folder / "votes.jsonl").write_text(jsonl_text(votes), encoding="utf-8")
    return path


def bars_of(analysis: Analysis) -> list[tuple[str, list[PairResult]]]:
    """Per model pair its results, one per question; the study's first model is on the left wherever it takes part."""
    names = dict.fromkeys((result.first, result.second) for result in analysis.pairs)
    return [
        (
            f"{first} vs {second}",
            [result for result in analysis.pairs if (result.first, result.second) == (first, second)],
        )
        for first, second in names
    ]


def figure(analysis: Analysis, kind: str) -> bytes:
    """The stacked win-rate figure as an svg, png or pdf file."""
    from matplotlib import rc_context

    style = {key: FIGURE_INK if value == INK else value for key, value in STYLE.items()}
    meta = {"Date": None, "Title": "Share of votes"} if kind == "svg" else None
    with rc_context({**style, "pdf.fonttype": 42, "svg.hashsalt": "study"}):
        buffer = io.BytesIO()
        _figure(analysis, FIGURE_INK).savefig(buffer, format=kind, dpi=200, metadata=meta)
    return buffer.getvalue()


def _figure(analysis: Analysis, ink: str) -> Figure:
    """One block per model pair, one bar per question: wins, ties, losses as shares of all votes (Fig. 8)."""
    from matplotlib.figure import Figure

    blocks = bars_of(analysis)
    rows = sum(len(results) for _, results in blocks) + 0.9 * len(blocks)
    figure = Figure(figsize=(7.2, 0.75 + 0.36 * rows), layout="constrained")
    axes = figure.add_subplot()
    height, ticks = 0.0, []
    for name, results in blocks:
        axes.text(0, height - 0.05, name, fontweight="bold", va="center", fontsize=10.5)
        for result in results:
            height += 1
            _bar(axes, height, result)
            ticks.append((height, LABELS[result.question]))
        half = (height - len(results) + 0.55, height + 0.45)
        axes.plot([0.5, 0.5], half, color=ink, linewidth=0.8, linestyle=":", alpha=0.6)
        height += 1.5
    axes.set(xlim=(0, 1), ylim=(height - 0.8, -0.6), xticks=[])
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    handles = [axes.barh([0], [0], color=color) for color in (WINS, TIES, LOSSES)]
    figure.legend(handles, ["first preferred", "tie", "second preferred"], loc="outside lower center", ncols=3)  # type: ignore[call-overload]
    return figure


def _bar(axes: Any, place: float, result: PairResult) -> None:
    start = 0.0
    for count, color in ((result.wins, WINS), (result.ties, TIES), (result.losses, LOSSES)):
        share = count / result.votes
        axes.barh([place], [share], left=start, color=color, height=0.74)
        if share > 0.06:
            axes.text(
                start + share / 2, place, f"{100 * share:.0f}%", ha="center", va="center", color="white", fontsize=9
            )
        start += share


def markdown_text(analysis: Analysis) -> str:
    """The tables as Markdown, for a paper's appendix or an issue."""
    lines = [f"# {analysis.title}", "", _summary(analysis), ""]
    for heading, results in (("Win rates", analysis.pairs), ("By task", analysis.by_task)):
        if results:
            lines += [f"## {heading}", "", str(result_table(results))]
    lines += [
        "## Bradley-Terry scores, agreement, bias",
        "",
        *(f"- {sentence}" for sentence in sentences(analysis)),
        "",
    ]
    return "\n".join(lines)


def result_table(results: Sequence[PairResult]) -> Table:
    """Votes, shares with intervals and tests, a row per pair, question and task."""
    columns = (
        *("question", "task", "first", "second", "wins", "ties", "losses"),
        *("win rate [Wilson]", "score [clustered]", "p", "p (Holm)"),
    )
    return Table(columns, [[_result_row(result) for result in results]])


def pair_tables(results: Sequence[PairResult]) -> dict[str, Table]:
    """The same for a terminal of 80 columns: for each pair of models a table with a row per question and task."""
    columns = ("", "wins / ties / losses", "score", "win rate", "p", "p (Holm)")
    return {
        group.title: Table(columns, [[[Cell(row.title), *row.cells] for row in group.rows]])
        for group in _groups(results)
    }


def _result_row(result: PairResult) -> list[Cell]:
    counts = (str(result.wins), str(result.ties), str(result.losses))
    shares = (_share(result.win_rate, result.wilson), _share(result.score, result.clustered))
    names = (LABELS[result.question], result.task or "all", result.first, result.second)
    return texts(*names, *counts, *shares, p_value(result.p), p_value(result.p_holm))


def sentences(analysis: Analysis) -> list[str]:
    """Bradley-Terry scores, agreement and bias in words, one sentence each."""
    found = []
    for fit in analysis.bradley_terry:
        label = LABELS[fit.question]
        if fit.why_not:
            found.append(f"{label}: no Bradley-Terry scores, because {fit.why_not}.")
            continue
        order = sorted(fit.scores, key=lambda name: -fit.scores[name])
        listed = ", ".join(f"{name} {difference(fit.scores[name], *fit.intervals[name], 2)}" for name in order)
        left_out = f" ({fit.degenerate} of {fit.replicates} replicates had no maximum)"
        found.append(f"{label}: Bradley-Terry log scores {listed}{left_out if fit.degenerate else ''}.")
    for own in analysis.agreement:
        alpha = "not measurable" if math.isnan(own.alpha) else f"{own.alpha:.2f}"
        pairwise = "-" if math.isnan(own.pairwise) else f"{100 * own.pairwise:.0f} %"
        repeats = f"; with themselves on {own.self_same} of {own.self_count} repeats" if own.self_count else ""
        found.append(
            f"{LABELS[own.question]}: raters agree with each other on {pairwise} of the pairs of votes "
            f"(Krippendorff's alpha {alpha}, {own.shared_pairs} pairs of images){repeats}."
        )
    for bias in analysis.bias:
        rate = _share(bias.share, bias.wilson)
        found.append(f"{LABELS[bias.question]}: the left image won {rate} of the decided votes (p {p_value(bias.p)}).")
    return found


@dataclass(frozen=True)
class Bar:
    """The answers to one question on a pair of models: (share in percent, count, color) of wins, ties, losses."""

    label: str
    parts: Sequence[tuple[float, int, str]]
    text: str


def html_text(analysis: Analysis) -> str:
    """The page, without outside references."""
    tables = (("Win rates", analysis.pairs), ("By task", analysis.by_task))
    return render(
        "study/report.html.jinja",
        a=analysis,
        verdict=verdict(analysis),
        summary=_summary(analysis),
        bars=[(name, [_answers(result) for result in results]) for name, results in bars_of(analysis)],
        legend=(("first preferred", WINS), ("tie", TIES), ("second preferred", LOSSES)),
        plots=_plots(analysis),
        columns=("wins / ties / losses", "score [clustered]", "win rate [Wilson]", "p", "p (Holm)"),
        tables=[(name, _groups(results)) for name, results in tables if results],
        sentences=sentences(analysis),
    )


def verdict(analysis: Analysis) -> Verdict:
    """For every pair of models, whom the raters prefer on the first question; nothing inside the interval."""
    question = analysis.pairs[0].question
    results = [result for result in analysis.pairs if result.question == question]
    numbers = [
        Number(f"{result.first} against {result.second}", _share(result.score, result.clustered)) for result in results
    ]
    text = f"{LABELS[question]}: {'; '.join(map(_preferred, results))}."
    note = (
        "Score: wins plus half the ties, as a share of all votes; 50\u00a0% is a draw. Brackets: 95\u00a0% interval over "
        "prompts, raters and votes."
    )
    return Verdict(text, numbers, [note])


def _preferred(result: PairResult) -> str:
    low, high = result.clustered
    few = low == high != 0.5 and result.p >= LEVEL  # all votes agree, so every bootstrap sample is the same
    if math.isnan(low) or few:
        return f"too few votes to compare {result.first} and {result.second}"
    if low > 0.5:
        return f"raters prefer {result.first} to {result.second}"
    if high < 0.5:
        return f"raters prefer {result.second} to {result.first}"
    return f"{result.first} and {result.second} are not distinguishable"


def _answers(result: PairResult) -> Bar:
    counts = ((result.wins, WINS), (result.ties, TIES), (result.losses, LOSSES))
    parts = [(round(100 * count / result.votes, 2), count, color) for count, color in counts if count]
    return Bar(LABELS[result.question], parts, f"{result.votes} votes")


def _plots(analysis: Analysis) -> list[DotPlot]:
    """The score of every pair of models with its interval, a plot for each question."""
    found = []
    for question in dict.fromkeys(result.question for result in analysis.pairs):
        dots = [
            Dot(
                f"{result.first} against {result.second}",
                WINS if result.clustered[0] > 0.5 else LOSSES if result.clustered[1] < 0.5 else TIES,
                100 * result.score,
                *(100 * end for end in result.clustered),
                _share(result.score, result.clustered),
            )
            for result in analysis.pairs
            if result.question == question
        ]
        found.append(dot_plot(f"{LABELS[question]}: score in %", dots, 50.0))
    return [plot for plot in found if plot]


def _groups(results: Sequence[PairResult]) -> list[Group]:
    """A row for each question (and task) below its pair of models."""
    pairs: dict[str, list[TableRow]] = {}
    for result in results:
        counts = f"{result.wins} / {result.ties} / {result.losses}"
        shares = (_share(result.score, result.clustered), _share(result.win_rate, result.wilson))
        cells = [Cell(text) for text in (counts, *shares, p_value(result.p), p_value(result.p_holm))]
        title = f"{LABELS[result.question]}, {result.task}" if result.task else LABELS[result.question]
        pairs.setdefault(f"{result.first} against {result.second}", []).append(TableRow(title, cells))
    return [Group(title, rows) for title, rows in pairs.items()]


def _summary(analysis: Analysis) -> str:
    used = sum(row.used for row in analysis.raters)
    return (
        f"{analysis.answered_screens} of {analysis.planned_screens} screens answered by {len(analysis.raters)} raters; "
        f"{used} used, {len(analysis.raters) - used} left out for failing more than {analysis.max_failed_checks} "
        "attention checks. Repeats and checks are in no win rate. Win rate: wins among decided votes, Wilson's 95 % "
        "interval, votes taken as independent. Score: wins plus half the ties over all votes, 95 % interval of "
        f"{analysis.replicates} bootstraps each over prompts, raters and votes: the one to quote. p: exact sign test."
    )


def _share(value: float, interval: Interval) -> str:
    if math.isnan(value):
        return MISSING
    if math.isnan(interval[0]):
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def plain_table(rows: Mapping[str, object]) -> str:
    """Names and values in two aligned columns, for the terminal."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
