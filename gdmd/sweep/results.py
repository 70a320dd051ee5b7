"""The pages of a sweep, rebuilt from its table on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdmd.config.sweep import SweepConfig
from gdmd.io import RunError, read_json, typed
from gdmd.sweep.figures import draw_all
from gdmd.sweep.page import About, quoted, write_page
from gdmd.sweep.pipeline_page import table_line, write_pipelines
from gdmd.sweep.pool import Outcome
from gdmd.sweep.runs import GRIDS, IMAGES, images_are_current, key_of, plan, read_table
from gdmd.sweep.spec import Sweep
from gdmd.sweep.tables import OVERALL, Line, Results, Row, against_headline

PAGE, TABLE, FEATURES = "shapes.md", "table.jsonl", "fig3_features.png"


@dataclass(frozen=True)
class Stored:
    """The part of a table that belongs to a sweep.

    missing: number of runs without a line; past: number of lines of other settings or of removed rows.
    """

    results: Results
    missing: int = 0
    past: int = 0


def stored_results(sweep: Sweep, folder: Path, *, past: bool = False) -> Stored:
    """The lines of this sweep.

    past: for a row without any line under the present settings, take the lines that the table has, so that a finished
    table can be shown after options were renamed or removed. Otherwise lines of other settings are left out.
    """
    config = sweep.config
    keys = dict.fromkeys(run.key for run in plan(sweep))
    table = [table_line(line) for line in read_table(_table(folder, config.name))]
    exact = {key_of(line): line for line in table if key_of(line) in keys}
    old: dict[tuple[str, int, str], Line] = {}
    if past:
        done = {(method, budget) for method, _, budget, _ in exact}
        shown = {row.name for row in (*config.every_row, *config.past_rows)}
        left = (line for line in table if line["method"] in shown and (line["method"], line["budget"]) not in done)
        old = {(line["method"], line["seed"], line["budget"]): line for line in left}
    rows = [Row(row.name, row.title, "teacher") for row in config.teachers]
    rows += [Row(row.name, row.title, row.kind, tuple(row.tables)) for row in (*config.rows, *config.past_rows)]
    rows += [Row(row.name, row.title, "exported") for row in config.exports]
    lines = [exact[key] for key in keys if key in exact]
    missing = sum(key not in exact and key[:3] not in old for key in keys)
    return Stored(Results(rows, [*lines, *old.values()], config.headline), missing, len(old))


def write_pages(sweep: Sweep, source: str, folder: Path, *, only_pages: bool) -> Path | None:
    """Write the figures and shapes.md, or NAME.md for a sweep over pipelines.

    None (an error with ``only_pages``) if no run is finished.

    only_pages: nothing was trained, so lines of earlier settings are shown too.
    """
    stored = stored_results(sweep, folder, past=only_pages)
    results = stored.results
    config = sweep.config.model_copy(update={"about": sweep.config.about + _past_note(stored)})
    if not results.lines:
        if only_pages:
            raise RunError(
                f"{_table(folder, config.name)} has no line of sweep {config.name!r}; run it first, without --pages-only"
            )
        return None
    stale = (folder / IMAGES).exists() and not images_are_current(sweep, folder)
    command = f"gdmd sweep {typed(source)}"  # without --out: readers do not have that folder
    if sweep.of_pipelines:
        return write_pipelines(config, results, command, folder, stored.missing, stale=stale)
    draw_all(results, folder / "figures", [] if stale else _features(folder))
    about = About(
        title=f"Sweep on Shapes: {config.name}",
        about=config.about,
        command=command,
        beginning=beginning(config),
        seeds=config.seeds,
        reference=config.titles[config.reference or config.headline] if "passes" in config.budgets else "",
        split=config.evaluation.split,
        images=int(results.lines[0]["images"]),
        missing=stored.missing,
        others=other_seeds(config),
    )
    drawn = [path.name for path in (folder / "figures").glob("*.png")]
    if stale:  # images of other runs or settings
        drawn = [name for name in drawn if name not in (*GRIDS, FEATURES)]
    return write_page(folder / PAGE, results, about, drawn)


def _past_note(stored: Stored) -> str:
    if not stored.past:
        return ""
    return (
        f"\n\n{stored.past} of {len(stored.results.lines)} lines of the table were measured with an earlier version of "
        "the settings or of the code; the commit of each is in the table."
    )


def beginning(config: SweepConfig) -> str:
    """Where the students of a sweep start and how many updates they take, in sentences."""
    firsts = [row for row in config.rows if row.name in {each.start_from for each in config.rows}]
    who = "Students take" if firsts else "Every student starts from the same teacher, without a cold start, and takes"
    text = f"{who} {config.student_updates:,} updates."
    for first in firsts:
        later = [row for row in config.rows if row.start_from == first.name]
        groups = []
        for updates in dict.fromkeys(map(config.updates_of, later)):
            titles = ", ".join(quoted(row.title) for row in later if config.updates_of(row) == updates)
            groups.append(f"{titles} ({updates:,} updates)")
        text += f" Rows that start from {quoted(first.title)} of the same seed: {', '.join(groups)}."
    if firsts:
        text += " Updates, passes and seconds of these rows do not include the first stage, which has its own row."
    others = [row for row in config.rows if row.student_updates is not None and not row.start_from]
    own = ", ".join(f"{quoted(row.title)} ({row.student_updates:,})" for row in others)
    return text + (f" Rows with another number of updates: {own}." if others else "")


def other_seeds(config: SweepConfig) -> str:
    """The rows whose seeds are not those of the sweep, as a part of a sentence; "" without any."""
    found: dict[tuple[int, ...], list[str]] = {}
    for row in config.sampled:
        if config.seeds_of(row) != config.seeds:
            found.setdefault(config.seeds_of(row), []).append(f"**{row.title}**")
    return "".join(f", {' and '.join(rows)} over seeds {', '.join(map(str, own))}" for own, rows in found.items())


def summary(sweep: Sweep, outcome: Outcome, *, only_pages: bool = False) -> dict[str, Any]:
    """What ``gdmd sweep --json`` prints."""
    stored = stored_results(sweep, outcome.folder, past=only_pages)
    families = sweep.of_pipelines  # whose rows are compared on the page, within their family
    tests = {} if families else {each.row.name: each for each in against_headline(stored.results, OVERALL)}
    return {
        "folder": str(outcome.folder),
        "table": str(_table(outcome.folder, sweep.config.name)),
        "page": str(outcome.page) if outcome.page else None,
        "trained": outcome.trained,
        "cached": outcome.cached,
        "failed": outcome.failed,
        "missing": stored.missing,
        "past": stored.past,
        "rows": {row.name: _row(stored.results, row, tests) for row in stored.results.present()},
    }


def _row(results: Results, row: Row, tests: Mapping[str, Any]) -> dict[str, Any]:
    found = results.summary(row.name, OVERALL)
    tested = tests.get(row.name)
    return {
        "kind": row.kind,
        "seeds": found.count if found else 0,
        "shapeseval": found.mean if found else None,
        "std": found.std if found else None,
        "behind_headline": tested.test.difference if tested else None,
        "p_holm": tested.adjusted if tested else None,
    }


def _table(folder: Path, name: str) -> Path:
    """table.jsonl of a sweep's folder; without one a published NAME.jsonl or shapes.jsonl."""
    published = [file for file in (folder / f"{name}.jsonl", folder / "shapes.jsonl") if file.exists()]
    return published[0] if published and not (folder / TABLE).exists() else folder / TABLE


def _features(folder: Path) -> Sequence[Mapping[str, Any]]:
    path = folder / IMAGES
    if not path.exists():
        return []
    panels: Sequence[Mapping[str, Any]] = read_json(path, "Delete it to generate the images again.").get("panels", [])
    return panels
