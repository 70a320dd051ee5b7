"""The pages of a comparison, made again from its table whenever they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdmd.config.sweep import CompareSpec
from gdmd.io import RunError, read_json, typed
from gdmd.sweep.cells import GRIDS, key_of, pictured, plan, read_table
from gdmd.sweep.figures import draw_all
from gdmd.sweep.page import About, write_page
from gdmd.sweep.pool import Outcome
from gdmd.sweep.spec import Comparison
from gdmd.sweep.tables import OVERALL, Results, Row, against_headline

PAGE, TABLE, PICTURES, FEATURES = "shapes.md", "table.jsonl", "pictures.json", "fig3_features.png"


def results_of(comparison: Comparison, folder: Path) -> tuple[Results, int]:
    """The lines of this comparison (those of other settings in the same table are left out); how many are missing."""
    spec = comparison.spec
    keys = dict.fromkeys(cell.key for cell in plan(comparison))
    known = {key_of(line): line for line in read_table(_table(folder)) if key_of(line) in keys}
    rows = [Row(row.name, row.title, "teacher") for row in spec.teachers]
    rows += [Row(row.name, row.title, row.kind, tuple(row.tables)) for row in spec.rows]
    return Results(rows, [known[key] for key in keys if key in known], spec.headline), len(keys) - len(known)


def write_pages(comparison: Comparison, source: str, folder: Path, *, required: bool) -> Path | None:
    """Write the figures and shapes.md; None (or, if ``required``, an error) while no cell is finished."""
    results, missing = results_of(comparison, folder)
    if not results.lines:
        if required:
            raise RunError(
                f"{_table(folder)} holds no line of comparison {comparison.spec.name!r}; run it first without --pages-only"
            )
        return None
    stale = (folder / PICTURES).exists() and not pictured(comparison, folder)
    draw_all(results, folder / "figures", [] if stale else _features(folder))
    spec = comparison.spec
    reference = spec.titles[spec.reference or spec.headline] if "passes" in spec.budgets else ""
    about = About(
        title=f"Comparison on Shapes: {spec.name}",
        about=spec.about,
        command=f"gdmd sweep {typed(source)}",  # without --out: that folder is nobody else's
        beginning=beginning(spec),
        seeds=spec.seeds,
        reference=reference,
        split=spec.evaluation.split,
        images=int(results.lines[0]["images"]),
        missing=missing,
        others=other_seeds(spec),
    )
    drawn = [path.name for path in (folder / "figures").glob("*.png")]
    if stale:  # images of other cells or settings
        drawn = [name for name in drawn if name not in (*GRIDS, FEATURES)]
    return write_page(folder / PAGE, results, about, drawn)


def beginning(spec: CompareSpec) -> str:
    """Where the students of a comparison begin and how many updates they take, in sentences."""
    firsts = [row for row in spec.rows if row.name in {each.start_from for each in spec.rows}]
    who = "Students take" if firsts else "Every student starts from the same teacher, without a cold start, and takes"
    text = f"{who} {spec.student_updates:,} updates."
    for first in firsts:
        text += f" {first.title} starts from the teacher; with its student of the same seed begin"
        later = [row for row in spec.rows if row.start_from == first.name]
        for updates in dict.fromkeys(map(spec.updates_of, later)):
            titles = ", ".join(row.title for row in later if spec.updates_of(row) == updates)
            text += f", for {updates:,} updates: {titles};"
        text = text[:-1] + "."
    others = [row for row in spec.rows if row.student_updates is not None and not row.start_from]
    return text + "".join(f" {row.title} takes {row.student_updates:,} updates." for row in others)


def other_seeds(spec: CompareSpec) -> str:
    """Which rows have other seeds than the comparison, as a part of a sentence; "" without any."""
    found: dict[tuple[int, ...], list[str]] = {}
    for row in spec.every_row:
        if spec.seeds_of(row) != spec.seeds:
            found.setdefault(spec.seeds_of(row), []).append(f"**{row.title}**")
    return "".join(f", {' and '.join(rows)} over seeds {', '.join(map(str, own))}" for own, rows in found.items())


def summary(comparison: Comparison, outcome: Outcome) -> dict[str, Any]:
    """What ``gdmd sweep --json`` prints."""
    results, missing = results_of(comparison, outcome.folder)
    tests = {each.row.name: each for each in against_headline(results, OVERALL)}
    return {
        "folder": str(outcome.folder),
        "table": str(_table(outcome.folder)),
        "page": str(outcome.page) if outcome.page else None,
        "trained": outcome.trained,
        "cached": outcome.cached,
        "failed": outcome.failed,
        "missing": missing,
        "rows": {row.name: _row(results, row, tests) for row in results.present()},
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


def _table(folder: Path) -> Path:
    """table.jsonl of a comparison's folder, or the committed shapes.jsonl."""
    committed = folder / "shapes.jsonl"
    return committed if committed.exists() and not (folder / TABLE).exists() else folder / TABLE


def _features(folder: Path) -> Sequence[Mapping[str, Any]]:
    path = folder / PICTURES
    if not path.exists():
        return []
    panels: Sequence[Mapping[str, Any]] = read_json(path, "Delete it, and the images are drawn again.").get(
        "panels", []
    )
    return panels
