"""compare.html: models on the same prompts. The verdict, dot plots with intervals, images side by side, one table."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdmd.config.names import listed
from gdmd.evaluation.table import TITLES
from gdmd.evaluation.verdict import FEW, PER_IMAGE, Estimate, paired
from gdmd.io import write_atomic
from gdmd.reporting.pages import (
    Dot,
    DotPlot,
    Group,
    Number,
    TableRow,
    Verdict,
    data_uri,
    digits_for,
    dot_plot,
    render,
)
from gdmd.reporting.plots import colors_of
from gdmd.reporting.tables import MISSING, Cell, best_of, difference, estimate, number
from gdmd.shapes.evaluate import CHECKED
from gdmd.sources.folders import read_image

LARGEST = 320
"""Pixels of the longer side in the gallery; the originals stay in their folders."""
SHAPESEVAL = "ShapesEval"
MOST = 3
"""With more later models than this, the verdict shows no numbers; the plots do."""
Row = Mapping[str, Any]
Rows = Mapping[str, Row]


@dataclass(frozen=True)
class Gallery:
    """A model's name and one image file per shown prompt; for Shapes, whether each image is right."""

    name: str
    files: Sequence[Path]
    right: Sequence[bool | None] = ()


def write_page(path: Path, rows: Rows, galleries: Sequence[Gallery], prompts: Sequence[str]) -> Path:
    """rows: model -> summary of ``gdmd eval compare``; galleries in the same order, one image per prompt."""
    names = list(rows)
    page = render(
        "evaluation/models.html.jinja",
        names=names,
        colors=colors_of(names),
        facts=[_facts(row) for row in rows.values()],
        verdict=verdict(rows),
        plots=plots(rows),
        groups=groups(rows),
        checked=any(one.right for one in galleries),
        prompts=[(text, [_shown(one, k) for one in galleries]) for k, text in enumerate(prompts)],
    )
    write_atomic(path, page, "the page")
    return path


def verdict(rows: Rows) -> Verdict:
    """Every later model against the first: on which scores it is higher, lower, or not distinguishable."""
    first, *later = rows
    found = {name: differences(rows, name) for name in later}
    if not any(found.values()):
        return Verdict(f"{', '.join(rows)}: the models have no common scores.")
    label = _headline(rows, next(own for own in found.values() if own))
    own = {name: each[label] for name, each in found.items() if label in each}
    answers: dict[str, list[str]] = {}
    for name, each in own.items():
        answers.setdefault(_words(each), []).append(name)
    parts = [
        f"{listed(names, quoted=False, last='and')} {'are' if len(names) > 1 else 'is'} {words}"
        for words, names in answers.items()
    ]
    notes = ["Differences are paired: the same prompts, image by image. Brackets: 95\u00a0% interval over prompts."]
    if any(_trained(row, one) for row in rows.values() for one in (SHAPESEVAL, *row["scores"])):
        notes.append("† trained on this score: a gain proves little.")
    numbers = []
    if len(later) <= MOST:
        notes = [*filter(None, (_on_the_rest(label, name, rows, each) for name, each in found.items())), *notes]
        numbers = [Number(f"{label}, {name} minus {first}", _signed(each)) for name, each in own.items()]
    if len(later) == 1:
        numbers = [Number(f"{label} of {name}", _mean(row, label)) for name, row in rows.items()] + numbers
    return Verdict(f"On {_marked(rows, label)}, compared with {first}: {'; '.join(parts)}.", numbers, notes)


def differences(rows: Rows, name: str) -> dict[str, Estimate]:
    """A model minus the first one, score by score; ShapesEval comes first if the images were checked.

    No interval below FEW prompts with a score: OCR, for example, leaves out those that quote no text.
    """
    first = next(iter(rows.values()))
    found = {}
    if PER_IMAGE in first and PER_IMAGE in rows[name] and (own := paired(rows[name], first)) is not None:
        found[SHAPESEVAL] = own
    for label, one in rows[name]["against_first"].items():
        if one["mean"] is not None:
            prompts = one.get("prompts", rows[name]["prompts"])  # earlier versions did not store it
            ends = (one["low"], one["high"]) if prompts >= FEW else (None, None)
            found[label] = Estimate(one["mean"], *(_or_nan(end) for end in ends))
    return found


def plots(rows: Rows) -> list[DotPlot]:
    """Every score with its interval, and next to it the differences to the first model."""
    names = list(rows)
    colors = dict(zip(names, colors_of(names), strict=True))
    labels = dict.fromkeys(label for row in rows.values() for label in row["scores"])
    if all(row.get("shapeseval") for row in rows.values()):
        labels = dict.fromkeys([SHAPESEVAL, *labels])
    drawn = []
    for label in labels:
        cells = {name: _score(row, label) for name, row in rows.items()}
        digits = digits_for([(c["high"] - c["low"]) / 2 for c in cells.values() if c and c["low"] is not None])
        dots = [
            Dot(name, colors[name], c["mean"], _or_nan(c["low"]), _or_nan(c["high"]), number(c["mean"], digits))
            for name, c in cells.items()
            if c and c["mean"] is not None
        ]
        drawn.append(dot_plot(label, dots))
        found = {name: differences(rows, name).get(label) for name in names[1:]}
        dots = [Dot(name, colors[name], d.mean, d.low, d.high, _signed(d)) for name, d in found.items() if d]
        drawn.append(dot_plot(f"{label}, minus {names[0]}", dots, 0.0))
    return [plot for plot in drawn if plot]


def groups(rows: Rows) -> list[Group]:
    """The table: scores, differences to the first model, tasks, distances and cost."""
    first = next(iter(rows))
    titled = (
        ("Scores, mean over images", score_lines(rows)),
        (f"Difference to {first}, and the share of images that score higher", difference_lines(rows)),
        ("By task", task_lines(rows)),
        ("Distances, diversity, cost (no best value for diversity and spread)", other_lines(rows)),
    )
    return [Group(title, lines) for title, lines in titled if lines]


def score_lines(rows: Rows) -> list[TableRow]:
    """Mean and interval of every scorer; a dagger where that model was trained on it, "?" where unknown."""
    labels = dict.fromkeys(label for row in rows.values() for label in row["scores"])
    return [_line(label, [row["scores"].get(label) for row in rows.values()], "mean") for label in labels]


def task_lines(rows: Rows) -> list[TableRow]:
    """ShapesEval by task, or GenEval where the folders were scored; empty where neither was. Marked as scores are."""
    if all(row.get("shapeseval") for row in rows.values()):
        tasks = dict.fromkeys(task for row in rows.values() for task in row["shapeseval"])
        found = []
        for task in tasks:
            ends = [row["shapeseval_interval"] if task == "overall" else (None, None) for row in rows.values()]
            values = [row["shapeseval"].get(task) for row in rows.values()]
            cells = [
                {"mean": v, "low": low, "high": high, "trained": _seen(row, CHECKED)}
                for row, v, (low, high) in zip(rows.values(), values, ends, strict=True)
            ]
            found.append(_line(f"{SHAPESEVAL} {TITLES.get(task, task)}", cells, "mean"))
        return found
    scored = [
        {task: one | {"trained": _seen(row, "geneval")} for task, one in (row.get("geneval") or {}).items()}
        for row in rows.values()
    ]
    tasks = dict.fromkeys(task for own in scored for task in own)
    return [_line(f"GenEval (HF detector) {task}", [own.get(task) for own in scored], "value") for task in tasks]


_OTHERS = {
    "fidelity": ("render fidelity", 1),
    "coverage": ("attribute coverage", 1),
    "diversity": ("diversity", 0),
    "spread": ("spread", 0),
    "frechet": ("Fréchet distance (lower is better)", -1),
    "mmd": ("MMD (lower is better)", -1),
    "seconds_per_image": ("seconds per image, first batch left out", -1),
}


def other_lines(rows: Rows) -> list[TableRow]:
    """Fidelity, coverage, distances, diversity and cost."""
    found = []
    for key, (title, sign) in _OTHERS.items():
        values = [row.get(key) for row in rows.values()]
        if any(value is not None for value in values):
            texts = [MISSING if value is None else f"{value:.4g}" for value in values]
            found.append(_table_row(title, texts, values, sign))
    calls = [row["source"]["nfe"] for row in rows.values()]
    return [*found, _table_row("network calls per image", [MISSING if n is None else str(n) for n in calls], calls, 0)]


def difference_lines(rows: Rows) -> list[TableRow]:
    """Every score, model minus the first model: mean, interval, share of images on which it is higher."""
    found = {name: differences(rows, name) for name in list(rows)[1:]}
    labels = dict.fromkeys(label for own in found.values() for label in own)
    return [
        TableRow(
            label, [Cell(""), *(Cell(_difference(rows[name], own.get(label), label)) for name, own in found.items())]
        )
        for label in labels
    ]


def image_uri(file: Path) -> str:
    """A data URI of at most LARGEST pixels a side, a small image enlarged by whole pixels; always a PNG."""
    from PIL import Image

    image = read_image(file)
    image.thumbnail((LARGEST, LARGEST))
    times = LARGEST // max(image.size)
    if times > 1:  # a browser would blur it
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue())


def _shown(gallery: Gallery, k: int) -> tuple[str, bool | None]:
    return image_uri(gallery.files[k]), gallery.right[k] if gallery.right else None


def _on_the_rest(label: str, name: str, rows: Rows, found: Mapping[str, Estimate]) -> str:
    """How a model differs on the other scores, in a sentence; "" where there are none."""
    words: dict[str, list[str]] = {}
    for one, own in found.items():
        if one != label:
            words.setdefault(_words(own), []).append(one + " †" * _trained(rows[name], one))
    parts = [f"{text} on {listed(labels, quoted=False, last='and')}" for text, labels in words.items()]
    return f"{name} on the other scores: {'; '.join(parts)}." if parts else ""


def _words(found: Estimate) -> str:
    if math.isnan(found.low):
        return f"not judged (fewer than {FEW} prompts)"
    return {1: "higher", -1: "lower", 0: "not distinguishable"}[found.sign]


def _marked(rows: Rows, label: str) -> str:
    """A score with a dagger where a model was trained on it."""
    return label + " †" * any(_trained(row, label) for row in rows.values())


def _headline(rows: Rows, found: Mapping[str, Estimate]) -> str:
    """The score of the numbers at the top: the first that no model was trained on."""
    unseen = [label for label in found if not any(_trained(row, label) for row in rows.values())]
    return next(iter(unseen or found))


def _trained(row: Row, label: str) -> bool:
    if label == SHAPESEVAL:
        return bool(_seen(row, CHECKED))
    return bool((row["scores"].get(label) or {}).get("trained"))


def _seen(row: Row, label: str) -> bool | None:
    """Whether the model was trained on a reward; None = unknown."""
    known = row["source"]["trained"]
    return None if known is None else label in known


def _score(row: Row, label: str) -> Mapping[str, Any] | None:
    if label == SHAPESEVAL and row.get("shapeseval"):
        low, high = row["shapeseval_interval"]
        return {"mean": row["shapeseval"]["overall"], "low": low, "high": high}
    cell: Mapping[str, Any] | None = row["scores"].get(label)
    return cell


def _mean(row: Row, label: str) -> str:
    cell = _score(row, label)
    return MISSING if cell is None else _number(cell, shared_digits([cell]))


def _number(cell: Mapping[str, Any], digits: int) -> str:
    return estimate(cell["mean"], cell["low"], cell["high"], digits)


def _signed(found: Estimate) -> str:
    return difference(found.mean, found.low, found.high, digits_for([(found.high - found.low) / 2]))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def shared_digits(cells: Sequence[Mapping[str, Any] | None]) -> int:
    """Decimals of the scores that stand next to each other."""
    return digits_for([(c["high"] - c["low"]) / 2 for c in cells if c and c.get("low") is not None])


def _line(title: str, cells: Sequence[Mapping[str, Any] | None], key: str) -> TableRow:
    texts = [cell_text(cell, key, shared_digits(cells)) for cell in cells]
    return _table_row(title, texts, [cell[key] if cell else None for cell in cells], 1)


def cell_text(cell: Mapping[str, Any] | None, key: str, digits: int) -> str:
    """A score with its interval, whether the model was trained on it (†, ? unknown), and how many images have none."""
    if cell is None:
        return MISSING
    mark = {True: " †", False: "", None: " ?"}[cell.get("trained", False)]
    missing = f" ({cell['unscored']} not scored)" if cell.get("unscored") else ""
    return estimate(cell[key], cell.get("low"), cell.get("high"), digits) + mark + missing


def _difference(row: Row, found: Estimate | None, label: str) -> str:
    if found is None:
        return MISSING
    wins = (row["against_first"].get(label) or {}).get("wins")
    return _signed(found) + ("" if wins is None else f", {100 * wins:.0f} %")


def _table_row(title: str, texts: Sequence[str], values: Sequence[float | None], sign: int) -> TableRow:
    """The best value is shaded, several in a tie; none without an order, and none where all are equal."""
    top = best_of(values, sign)
    return TableRow(
        title, [Cell(text, value is not None and value == top) for text, value in zip(texts, values, strict=True)]
    )


def _facts(row: Row) -> str:
    source = row["source"]
    step = f", step {source['step']}" if source["step"] else ""
    if source["trained"] is None:
        trained = "training not known"
    else:
        trained = f"trained on {', '.join(source['trained'])}" if source["trained"] else "trained on no reward"
    return f"{source['kind']} {source['where']}{step}; {trained}"
