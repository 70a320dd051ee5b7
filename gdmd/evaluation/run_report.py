"""report.html: one self-contained page about a run. Everything that comes from outside is escaped by the template."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from gdmd.config import describe
from gdmd.config.load import load_config
from gdmd.config.run import RunConfig
from gdmd.data.image_files import open_image
from gdmd.evaluation.health import health_panels, training_curves
from gdmd.evaluation.run_results import Result, run_results
from gdmd.io import RunError, write_atomic
from gdmd.reporting.plots import Metrics, bars, radar
from gdmd.runs import reward_signal
from gdmd.runs.best_checkpoint import named_best
from gdmd.runs.checkpoint import newest_intact, steps
from gdmd.runs.inputs import change_lines, input_lines
from gdmd.runs.run_folder import Run, open_run, read_facts, read_metrics
from gdmd.shapes.grammar import TASKS

_log = logging.getLogger(__name__)
EVALUATION = "evaluation.json"
"""In a run folder: {row name: Evaluation.json()}, written with ``save_rows``."""
COMPARISON = "comparison*.png"
"""In grids/ of a Shapes run: teacher and students from the same noise, shown first."""
WIDEST = 1600
"""Pixels of an embedded grid; the original stays in grids/."""


@dataclass(frozen=True)
class Provenance:
    """What is needed to make the run again."""

    command: str = ""
    commit: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    started: str = ""
    config: str = ""  # YAML
    inputs: Sequence[str] = ()  # what was read, by content
    changes: Sequence[str] = ()  # inputs that changed while the run was stopped, accepted by the user


@dataclass(frozen=True)
class Column:
    """A measure of the summary table. seen: "trained", "unseen" or "" (a cost)."""

    title: str
    path: tuple[str, ...]
    seen: str
    best: int = 0  # +1 higher, -1 lower is better, 0 no ranking
    digits: int = 3


@dataclass(frozen=True)
class Cell:
    text: str
    seen: str
    best: bool


def write_report(
    path: Path,
    title: str,
    rows: Mapping[str, Mapping[str, Any]],
    *,
    grids: Mapping[str, bytes] | None = None,
    metrics: Mapping[str, Metrics] | None = None,
    trained: Collection[str] = (),
    provenance: Provenance | None = None,
    about: str = "",
    facts: Mapping[str, str] | None = None,
    results: Sequence[Result] = (),
    shapes: bool = True,
    findings: Sequence[str] = (),
) -> Path:
    """Write the page to ``path`` (a file, or a folder that gets report.html) and return where it lies.

    rows: row name -> ``Evaluation.json()``, the teacher first. grids: caption -> PNG. metrics: run name -> rows of
    metrics.jsonl. trained: names of the rewards the student was trained on; all other measures are marked unseen.
    facts: settings of the run. results: other evaluations of it. shapes: whether ``rows`` are what is expected.
    findings: what is wrong with the training, in sentences.
    """
    target = path if path.suffix == ".html" else path / "report.html"
    columns = _columns(rows, trained)
    page = _template().render(
        title=title,
        about=about,
        columns=columns,
        table=_table(rows, columns),
        trained=sorted(trained),
        radar=radar(rows, TASKS) if rows else "",
        speed=bars(_speeds(rows), "Sampling speed without decoding", "images / s"),
        grids=[(name, _embedded(png)) for name, png in (grids or {}).items()],
        facts=facts or {},
        results=results,
        shapes=shapes,
        runs=[(name, training_curves(own), health_panels(own)) for name, own in (metrics or {}).items()],
        findings=findings,
        provenance=provenance or Provenance(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, page, "the report")
    return target


def report_run(folder: Path) -> Path:
    """(Re)write report.html of a run folder from what lies in it; what is missing is left out.

    The rows of ``evaluation.json`` and the comparisons in grids/ belong to the Shapes world: a real model's page has none.
    """
    run = open_run(folder)
    cfg = load_config(RunConfig, folder / "config.yaml")
    shapes = cfg.model.kind == "shapes"
    metrics = read_metrics(folder)
    newest, damaged = newest_intact(run.checkpoints)
    for message in () if shapes else damaged:  # a Shapes run is measured first, which says so
        _log.warning("%s; %s", message, f"step {newest} is the newest that can be used" if newest else "none is left")
    return write_report(
        folder,
        f"gdmd run: {cfg.name}",
        read_rows(folder) if shapes else {},
        grids=_stored_grids(folder, COMPARISON if shapes else None),
        metrics={cfg.name: metrics},
        trained=describe.trained_rewards(cfg),
        provenance=_provenance(run),
        about=cfg.about,
        facts=describe.facts(cfg) | _progress(run, metrics, damaged),
        results=run_results(folder, newest),
        shapes=shapes,
        findings=reward_signal.findings(metrics, cfg.loop.batch_size, cfg.loop.steps),
    )


def _provenance(run: Run) -> Provenance:
    found = read_facts(run.path)
    return Provenance(
        command=" ".join(str(word) for word in found.get("command", ())),
        commit=found.get("commit"),
        seed=run.config.get("loop", {}).get("seed"),
        versions=found.get("versions", {}),
        machine=f"{found.get('platform', '')}, {found.get('cpu_count', '?')} CPU cores",
        started=found.get("started", ""),
        config=yaml.safe_dump(dict(run.config), sort_keys=False),
        inputs=input_lines(found),
        changes=change_lines(found),
    )


def _progress(run: Run, metrics: Metrics, damaged: Sequence[str]) -> dict[str, str]:
    """How far the run has come. damaged: what is wrong with the newest checkpoints."""
    there = steps(run.checkpoints)
    last = metrics[-1] if metrics else {}
    updates = last.get("updates/student", math.nan)
    counted = f", {updates:,.0f} student updates" if math.isfinite(updates) else ""
    best = named_best(run.checkpoints)
    chosen = f"; best: step {best.step} ({best.metric} = {best.value:.4g})" if best else ""
    return {
        "logged to": f"step {last['step']:,}{counted}" if last else "nothing yet",
        "checkpoints": (f"step {', '.join(map(str, there))}" if there else "none yet")
        + chosen
        + "".join(f"; {message}" for message in damaged),
    }


def save_rows(folder: Path, rows: Mapping[str, Mapping[str, Any]]) -> Path:
    """Keep the evaluations of a run (row name -> ``Evaluation.json()``) for its report."""
    path = folder / EVALUATION
    write_atomic(path, json.dumps(rows, indent=2), "the evaluation")
    return path


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The evaluations that ``save_rows`` kept; none yet is an empty mapping, a damaged file a RunError."""
    path = folder / EVALUATION
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(row["shapeseval"], dict) for row in rows.values()):
            raise ValueError("a row without ShapesEval")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot read {path}: {error}. Delete it: its rows are measured again.") from error
    return dict(rows)


def _columns(rows: Mapping[str, Mapping[str, Any]], trained: Collection[str]) -> list[Column]:
    """ShapesEval and its costs first, then its tasks, then what was trained on beside what was not."""
    rewards = dict.fromkeys(name for row in rows.values() for name in row.get("rewards", {}))
    ordered = sorted(rewards, key=lambda name: name not in trained)
    return [
        Column("overall", ("shapeseval", "overall"), "unseen", 1),
        Column("NFE", ("nfe",), "", 0, 0),
        Column("images/s", ("images_per_s",), "", 1, 1),
        Column("with decode", ("images_per_s_decoded",), "", 1, 1),
        *(Column(task.replace("_", " "), ("shapeseval", task), "unseen", 1, 2) for task in TASKS),
        *(Column(name, ("rewards", name), "trained" if name in trained else "unseen", 1) for name in ordered),
        Column("fidelity", ("fidelity",), "unseen", 1),
        Column("coverage", ("coverage",), "unseen", 1),
        Column("diversity", ("diversity",), "unseen"),
        Column("Fréchet", ("frechet",), "unseen", -1),
    ]


def _table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]) -> list[tuple[str, list[Cell]]]:
    best = [_best([_value(row, column) for row in rows.values()], column.best) for column in columns]
    table = []
    for name, row in rows.items():
        cells = []
        for column, top in zip(columns, best, strict=True):
            value = _value(row, column)
            text = "–" if value is None else f"{value:,.{column.digits}f}"
            if column.path == ("shapeseval", "overall") and None not in (row.get("interval") or [None]):
                text += " [{:.3f}, {:.3f}]".format(*row["interval"])
            cells.append(Cell(text, column.seen, value is not None and value == top and len(rows) > 1))
        table.append((name, cells))
    return table


def _value(row: Mapping[str, Any], column: Column) -> float | None:
    found: Any = row
    for key in column.path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else float(found)


def _best(values: Sequence[float | None], direction: int) -> float | None:
    """The best of different values: where all are equal none is better."""
    known = {value for value in values if value is not None}
    if len(known) < 2 or not direction:
        return None
    return max(known) if direction > 0 else min(known)


def _speeds(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    return {name: row.get("images_per_s") for name, row in rows.items()}


def _stored_grids(folder: Path, comparisons: str | None) -> dict[str, bytes]:
    """Comparisons, then the first and the last grid of the training."""
    compared = sorted((folder / "grids").glob(comparisons)) if comparisons else []
    numbered = {int(path.stem[5:]): path for path in (folder / "grids").glob("step_*.png") if path.stem[5:].isdigit()}
    shown = {f"The same noise through each sampler ({path.stem})": path for path in compared}
    for step in sorted({min(numbered), max(numbered)}) if numbered else []:
        shown[f"Student (EMA) after {step:,} iterations"] = numbered[step]
    return {name: _whole(path) for name, path in shown.items()}


def _whole(path: Path) -> bytes:
    """The content of an image file. RunError for one that was cut off."""
    content = path.read_bytes()
    try:
        open_image(content)
    except ValueError as error:
        raise RunError(f"{path} {error}; delete it, and the report does without it") from error
    return content


def _embedded(png: bytes) -> str:
    """A data URI; a grid of large images is embedded smaller."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as grid:
        if grid.width <= WIDEST:
            return _data_uri("png", png)
        small = grid.convert("RGB").resize((WIDEST, round(grid.height * WIDEST / grid.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return _data_uri("jpeg", buffer.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("gdmd.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )
