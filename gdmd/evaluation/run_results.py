"""What `gdmd eval preference` and `gdmd eval compare` wrote below a run folder, for the report of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdmd.evaluation.model_page import Line, difference_lines, other_lines, picture, score_lines, task_lines
from gdmd.io import RunError
from gdmd.sources.folders import read_images

PREFERENCE, COMPARISON = "preference.json", "compare.json"
SHOWN = 8
"""Images of an evaluation in the report, spread over its prompts."""
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """Lines of numbers under the names of their columns."""

    names: Sequence[str]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Result:
    """One evaluation: its folder, its options, its tables, and (prompt, data URI) of some of its images."""

    title: str
    note: str
    tables: Sequence[Table]
    images: Sequence[tuple[str, str]] = ()


def run_results(run: Path, newest: int | None) -> list[Result]:
    """Every evaluation below ``run``, at most one folder deep. newest: the step of the run's newest checkpoint.

    RunError for a damaged file.
    """
    return [*_each(run, PREFERENCE, _preference, newest), *_each(run, COMPARISON, _comparison, newest)]


def _each(run: Path, name: str, read: Any, newest: int | None) -> Iterator[Result]:
    for file in sorted((*run.glob(name), *run.glob(f"*/{name}"))):
        try:
            yield read(file, json.loads(file.read_text(encoding="utf-8")), newest)
        except RunError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
            raise RunError(f"{file} cannot be read ({error!r}); evaluate again, or delete it") from error


def _preference(file: Path, row: Mapping[str, Any], newest: int | None) -> Result:
    folder = file.parent
    rows = {str(row["source"]["name"]): row}
    home = folder / "images" if row["source"]["kind"] != "images" else Path(row["source"]["where"])
    return Result(f"Scores ({folder.name})", _note(row, newest), _tables(rows), _images(home))


def _comparison(file: Path, content: Mapping[str, Any], newest: int | None) -> Result:
    rows: Rows = content["rows"]
    first = next(iter(rows))
    tables = _tables(rows)
    if differences := difference_lines(rows):
        tables.append(Table([f"{name} minus {first}" for name in list(rows)[1:]], differences))
    own = next((row for row in rows.values() if _same(row["source"]["where"], file)), None)
    note = _note(own or rows[first], newest if own else None)
    return Result(
        f"Comparison ({file.parent.name})", f"{note} Images side by side: {file.parent / 'compare.html'}", tables
    )


def _same(where: str, file: Path) -> bool:
    """Whether a source is the run below which the file lies."""
    return Path(where).resolve() in file.resolve().parents


def _note(row: Mapping[str, Any], newest: int | None) -> str:
    step, count = row["source"]["step"], row["images_per_prompt"]
    asked = f"{row['prompts']} prompts of {row['prompt_file']}, {count} images per prompt, seed {row['seed']}"
    measured = "" if step is None else f"; step {step}"
    later = f", and the run has trained to step {newest} since" if step and newest and newest > step else ""
    return f"{asked}{measured}{later}. 95 % intervals over prompts. † trained on; ? not known."


def _tables(rows: Rows) -> list[Table]:
    parts = (score_lines(rows), task_lines(rows), other_lines(rows))
    return [Table(list(rows), lines) for lines in parts if lines]


def _images(home: Path) -> list[tuple[str, str]]:
    """The first image of SHOWN prompts; nothing where the images were moved."""
    if not home.is_dir():
        return []
    rows = [row for row in read_images(home).values() if row.images]
    count = min(SHOWN, len(rows))
    chosen = [rows[k * len(rows) // count] for k in range(count)]
    return [(row.text, picture(row.images[0])) for row in chosen]
