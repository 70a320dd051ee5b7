"""report.html: one self-contained page about a run. Everything that comes from outside is escaped by the template."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from gdmd.evaluation.health import health_panels, training_curves
from gdmd.evaluation.plots import Metrics, bars, radar
from gdmd.io import RunError, write_atomic
from gdmd.runs import reward_signal
from gdmd.runs.inputs import change_lines, input_lines
from gdmd.runs.rundir import open_run, read_facts, read_metrics
from gdmd.shapes.grammar import TASKS

EVALUATION = "evaluation.json"
"""In a run folder: {row name: Evaluation.json()}, written with ``save_rows``."""
COMPARISON = "comparison*.png"
"""In grids/ of a run folder: teacher and students from the same noise, shown first."""


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
    findings: Sequence[str] = (),
) -> Path:
    """Write the page to ``path`` (a file, or a folder that gets report.html) and return where it lies.

    rows: row name -> ``Evaluation.json()``, the teacher first. grids: caption -> PNG. metrics: run name -> rows of
    metrics.jsonl. trained: names of the rewards the student was trained on; all other measures are marked unseen.
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
        radar=radar(rows) if rows else "",
        speed=bars(_speeds(rows), "Sampling speed without decoding", "images / s"),
        grids=[(name, _data_uri(png)) for name, png in (grids or {}).items()],
        runs=[(name, training_curves(own), health_panels(own)) for name, own in (metrics or {}).items()],
        findings=findings,
        provenance=provenance or Provenance(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, page, "the report")
    return target


def report_run(folder: Path) -> Path:
    """(Re)write report.html of a run folder from what lies in it; rows and grids that are missing are left out."""
    run = open_run(folder)
    facts = read_facts(folder)
    config = dict(run.config)
    provenance = Provenance(
        command=" ".join(str(word) for word in facts.get("command", ())),
        commit=facts.get("commit"),
        seed=config.get("loop", {}).get("seed"),
        versions=facts.get("versions", {}),
        machine=f"{facts.get('platform', '')}, {facts.get('cpu_count', '?')} CPU cores",
        started=facts.get("started", ""),
        config=yaml.safe_dump(config, sort_keys=False),
        inputs=input_lines(facts),
        changes=change_lines(facts),
    )
    name = str(config.get("name", folder.name))
    loop, rows = config.get("loop", {}), read_metrics(folder)
    return write_report(
        folder,
        f"gdmd run: {name}",
        read_rows(folder),
        grids=_stored_grids(folder),
        metrics={name: rows},
        trained=[str(reward["kind"]) for reward in config.get("rewards", ())],
        provenance=provenance,
        about=str(config.get("about", "")),
        findings=reward_signal.findings(rows, int(loop.get("batch_size", 1)), int(loop.get("steps", 0))),
    )


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
        raise RunError(f"cannot read {path}: {error}. Make it again with gdmd eval.") from error
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
    known = [value for value in values if value is not None]
    if not known or not direction:
        return None
    return max(known) if direction > 0 else min(known)


def _speeds(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    return {name: row.get("images_per_s") for name, row in rows.items()}


def _stored_grids(folder: Path) -> dict[str, bytes]:
    """Comparisons, then the first and the last grid of the training."""
    compared = sorted((folder / "grids").glob(COMPARISON))
    steps = sorted((folder / "grids").glob("step_*.png"))
    shown = {f"The same noise through each sampler ({path.stem})": path for path in compared}
    for path in dict.fromkeys([*steps[:1], *steps[-1:]]):
        shown[f"Student (EMA) after {int(path.stem.removeprefix('step_')):,} iterations"] = path
    return {name: path.read_bytes() for name, path in shown.items()}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("gdmd.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )
