"""Results of `gdmd eval preference` and `gdmd eval compare` below a run folder, for the report of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdmd.evaluation.model_page import groups, image_uri, plots, score_lines, verdict
from gdmd.io import RunError
from gdmd.recipes.contents import checkpoint_content
from gdmd.reporting.pages import DotPlot, Group, Number, Verdict
from gdmd.sources.folders import read_images

PREFERENCE, COMPARISON = "preference.json", "compare.json"
SHOWN = 8
"""Images of an evaluation in the report, spread evenly over its prompts."""
OTHER_WEIGHTS = "These scores belong to other weights than this run has now at that step: evaluate it again."
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """Groups of measures under the names of the models."""

    names: Sequence[str]
    groups: Sequence[Group]


@dataclass(frozen=True)
class Result:
    """One evaluation: its folder, its options, its verdict, plots and table, and (prompt, data URI) of some images."""

    title: str
    note: str
    verdict: Verdict
    table: Table
    plots: Sequence[DotPlot] = ()
    images: Sequence[tuple[str, str]] = ()


def run_results(run: Path, newest: int | None) -> list[Result]:
    """Every evaluation below ``run``, at most one folder deep, comparisons first. newest: step of the newest checkpoint.

    RunError for a damaged file.
    """
    return [*_each(run, COMPARISON, _comparison, newest), *_each(run, PREFERENCE, _preference, newest)]


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
    name = str(row["source"]["name"])
    rows = {name: row}
    home = folder / "images" if row["source"]["kind"] != "images" else Path(row["source"]["where"])
    numbers = [Number(line.title, line.cells[0].text) for line in score_lines(rows)]
    answer = Verdict(
        f"{name} is scored, but not yet compared with another model on the same prompts.",
        numbers[:4],
        ["Brackets: 95 % interval over prompts. gdmd eval compare TEACHER RUN measures the difference to the teacher."],
    )
    return Result(
        f"Scores ({folder.name})",
        _note(row, None if row["source"]["kind"] == "run" and _own_run(row["source"], file) is None else newest),
        Verdict(OTHER_WEIGHTS) if _retrained(row, file) else answer,
        Table([name], groups(rows)),
        images=_images(home),
    )


def _comparison(file: Path, content: Mapping[str, Any], newest: int | None) -> Result:
    rows: Rows = content["rows"]
    own = next((row for row in rows.values() if _own_run(row["source"], file)), None)
    note = _note(own or next(iter(rows.values())), newest if own else None)
    return Result(
        f"Comparison ({file.parent.name})",
        f"{note} Images side by side: {file.parent / 'compare.html'}",
        Verdict(OTHER_WEIGHTS) if own and _retrained(own, file) else verdict(rows),
        Table(list(rows), groups(rows)),
        plots(rows),
    )


def _own_run(source: Mapping[str, Any], file: Path) -> Path | None:
    """The run that contains the file, if that is the source.

    Its path may be relative to another working directory than that of the report.
    """
    place = Path(source["where"])
    if source["kind"] != "run":
        return None
    holds = (p for p in file.resolve().parents if p == place.resolve() or p.parts[-len(place.parts) :] == place.parts)
    return next(holds, None)


def _retrained(row: Mapping[str, Any], file: Path) -> bool:
    """Whether the run that contains the file has another checkpoint now at the step that was scored."""
    step, weights = row["source"]["step"], row.get("weights")
    run = _own_run(row["source"], file)
    if step is None or weights is None or run is None:
        return False
    try:
        return checkpoint_content(run, step) != weights
    except OSError:  # removed since, as older checkpoints are
        return False


def _note(row: Mapping[str, Any], newest: int | None) -> str:
    step, count = row["source"]["step"], row["images_per_prompt"]
    asked = f"{row['prompts']} prompts of {row['prompt_file']}, {count} images per prompt, seed {row['seed']}"
    measured = "" if step is None else f"; step {step}"
    later = f", and the run has trained to step {newest} since" if step and newest and newest > step else ""
    return f"{asked}{measured}{later}. Brackets: 95 % interval over prompts. † trained on; ? not known."


def _images(home: Path) -> list[tuple[str, str]]:
    """The first image of SHOWN prompts; empty if the images were moved."""
    if not home.is_dir():
        return []
    rows = [row for row in read_images(home).values() if row.images]
    count = min(SHOWN, len(rows))
    chosen = [rows[k * len(rows) // count] for k in range(count)]
    return [(row.text, image_uri(row.images[0])) for row in chosen]
