"""One self-contained page that compares models: tables, radar, images side by side. All text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gdmd.io import write_atomic
from gdmd.reporting.plots import axes_radar, radar
from gdmd.shapes.grammar import TASKS
from gdmd.sources.folders import read_image

LARGEST = 320
"""Pixels of the longer side in the gallery; the originals stay in their folders."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Gallery:
    """A model's name and one image file per shown prompt."""

    name: str
    files: Sequence[Path]


@dataclass(frozen=True)
class Line:
    """A row of a table: title, one text per model, and which of them are best (several in a tie, none where all tie)."""

    title: str
    cells: Sequence[str]
    best: frozenset[int] = frozenset()


def write_page(path: Path, rows: Mapping[str, Row], galleries: Sequence[Gallery], prompts: Sequence[str]) -> Path:
    """rows: model -> summary of ``gdmd eval compare``; galleries in the same order, one image per prompt."""
    page = _template().render(
        names=list(rows),
        facts=[_facts(row) for row in rows.values()],
        first=next(iter(rows)),
        table1=score_lines(rows),
        table2=task_lines(rows),
        others=other_lines(rows),
        differences=difference_lines(rows),
        radar=_radar(rows),
        prompts=[(text, [picture(one.files[k]) for one in galleries]) for k, text in enumerate(prompts)],
    )
    write_atomic(path, page, "the page")
    return path


def score_lines(rows: Mapping[str, Row]) -> list[Line]:
    """Table 1: mean and interval of every scorer; a dagger where that model was trained on it, "?" where unknown."""
    labels = list(dict.fromkeys(label for row in rows.values() for label in row["scores"]))
    return [_line(label, [row["scores"].get(label) for row in rows.values()], "mean") for label in labels]


def task_lines(rows: Mapping[str, Row]) -> list[Line]:
    """Table 2: ShapesEval by task, or GenEval where the folders were scored; empty where neither was."""
    if all(row.get("shapeseval") for row in rows.values()):
        tasks = list(dict.fromkeys(task for row in rows.values() for task in row["shapeseval"]))
        found = []
        for task in tasks:
            ends = [row["shapeseval_interval"] if task == "overall" else (None, None) for row in rows.values()]
            values = [row["shapeseval"].get(task) for row in rows.values()]
            cells = [{"mean": v, "low": low, "high": high} for v, (low, high) in zip(values, ends, strict=True)]
            found.append(_line(f"ShapesEval {task.replace('_', ' ')}", cells, "mean"))
        return found
    if any(row.get("geneval") for row in rows.values()):
        tasks = list(dict.fromkeys(task for row in rows.values() for task in row.get("geneval") or {}))
        return [
            _line(
                f"GenEval (HF detector) {task}",
                [(row.get("geneval") or {}).get(task) for row in rows.values()],
                "value",
            )
            for task in tasks
        ]
    return []


def other_lines(rows: Mapping[str, Row]) -> list[Line]:
    """Fidelity, coverage, distances, diversity and cost; lower is better for frechet, mmd and seconds."""
    signs = {
        "fidelity": 1,
        "coverage": 1,
        "diversity": 0,
        "spread": 0,
        "frechet": -1,
        "mmd": -1,
        "seconds_per_image": -1,
    }
    found = []
    for key, sign in signs.items():
        values = [row.get(key) for row in rows.values()]
        if any(value is not None for value in values):
            cells = ["-" if value is None else f"{value:.4g}" for value in values]
            found.append(Line(key.replace("_", " "), cells, _best(values, sign)))
    calls = ["-" if row["source"]["nfe"] is None else str(row["source"]["nfe"]) for row in rows.values()]
    return [*found, Line("network calls per image", calls)]


def difference_lines(rows: Mapping[str, Row]) -> list[Line]:
    """Every scorer, model minus the first model on the same prompts and noise: mean, interval, share of wins."""
    later = list(rows.values())[1:]
    labels = list(dict.fromkeys(label for row in later for label in row["against_first"]))
    return [Line(label, [_difference(row["against_first"].get(label)) for row in later]) for label in labels]


def picture(file: Path) -> str:
    """A data URI of at most LARGEST pixels a side, a small image enlarged to squares; PNG, whatever the file is."""
    from PIL import Image

    image = read_image(file)
    image.thumbnail((LARGEST, LARGEST))
    times = LARGEST // max(image.size)
    if times > 1:  # a browser would blur it
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _line(title: str, cells: Sequence[Mapping[str, Any] | None], key: str) -> Line:
    return Line(title, [_cell(cell, key) for cell in cells], _best([cell[key] if cell else None for cell in cells], 1))


def _cell(cell: Mapping[str, Any] | None, key: str) -> str:
    if cell is None:
        return "-"
    ends = f" [{cell['low']:.4f}, {cell['high']:.4f}]" if cell.get("low") is not None else ""
    mark = {True: " †", False: "", None: " ?"}[cell.get("trained", False)]
    missing = f" ({cell['unscored']} not scored)" if cell.get("unscored") else ""
    return f"{'-' if cell[key] is None else format(cell[key], '.4f')}{ends}{mark}{missing}"


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "-"
    ends = f" [{found['low']:+.4f}, {found['high']:+.4f}]" if found["low"] is not None else ""
    return f"{found['mean']:+.4f}{ends}, wins {100 * found['wins']:.0f} %"


def _best(values: Sequence[float | None], sign: int) -> frozenset[int]:
    """The places of the best value; none without a direction, and where all are equal."""
    known = {k: sign * value for k, value in enumerate(values) if value is not None}
    if not sign or len(set(known.values())) < 2:
        return frozenset()
    top = max(known.values())
    return frozenset(k for k, value in known.items() if value == top)


def _facts(row: Row) -> str:
    source = row["source"]
    step = f", step {source['step']}" if source["step"] else ""
    trained = {None: "training not known"}.get(source["trained"], "") if source["trained"] is None else (
        f"trained on {', '.join(source['trained'])}" if source["trained"] else "trained on no reward"
    )  # fmt: skip
    return f"{source['kind']} {source['where']}{step}; {trained}"


def _radar(rows: Mapping[str, Row]) -> str:
    if all(row.get("shapeseval") for row in rows.values()):
        return radar(rows, TASKS)
    labels = [line.title for line in score_lines(rows)]
    values = {name: [(row["scores"].get(label) or {}).get("mean") for label in labels] for name, row in rows.items()}
    return axes_radar(labels, values, "Scorers, each from the worst model (inner ring) to the best (rim)")


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("gdmd.evaluation").joinpath("models.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )
