"""report.html of a run: the verdict, images, measures, health, curves and how to repeat it, in one file.

This module gathers the content; report.html.jinja has the HTML.
"""

from __future__ import annotations

import io
import json
import logging
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gdmd.config import describe
from gdmd.config.load import load_config
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.config.shapes_pipeline import draws_real_images
from gdmd.data.image_files import open_image
from gdmd.evaluation.health import Panel, health_panels, summary, training_curves
from gdmd.evaluation.reference_curves import compared_panels
from gdmd.evaluation.run_measures import Rows, measure_groups, measure_plots
from gdmd.evaluation.run_results import Result, run_results
from gdmd.evaluation.verdict import scores_of, shapes_verdict
from gdmd.io import RunError, write_atomic
from gdmd.reporting.pages import Verdict, data_uri, render
from gdmd.reporting.plots import Metrics, colors_of
from gdmd.runs import reward_signal
from gdmd.runs.best_checkpoint import named_best
from gdmd.runs.checkpoint import newest_intact, steps
from gdmd.runs.inputs import change_lines, input_lines
from gdmd.runs.run_folder import Run, config_change_lines, open_run, read_facts, read_metrics
from gdmd.runs.trained_on import trained_on
from gdmd.shapes.same_noise import SameNoise, read_same_noise

_log = logging.getLogger(__name__)
EVALUATION = "evaluation.json"
"""The file in a run folder with {row name: Evaluation.json()}, written with ``save_rows``."""
WIDEST = 1600
"""Largest width of an embedded grid, in pixels; the original stays in grids/."""


@dataclass(frozen=True)
class Provenance:
    """What is needed to repeat the run."""

    command: str = ""
    commit: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    started: str = ""
    config: str = ""  # YAML
    inputs: Sequence[str] = ()  # what was read, by content
    changes: Sequence[str] = ()  # inputs that changed while the run was stopped, accepted by the user
    resumed_with: Sequence[str] = ()  # changes of the configuration


@dataclass(frozen=True)
class Training:
    """The curves of a run, its health panels, and what is wrong with its rewards."""

    name: str
    anchor: str
    figures: Sequence[tuple[str, str]]
    panels: Sequence[Panel]
    findings: Sequence[str] = ()
    compared: Sequence[tuple[str, str, str]] = ()  # title, SVG and meaning, next to those of healthy runs

    @property
    def summary(self) -> str:
        """The counts of the panels' statuses; a finding about the rewards counts as bad."""
        flagged = [f"{len(self.findings)} bad reward{'s' * (len(self.findings) > 1)}"] if self.findings else []
        return ", ".join([*flagged, *filter(None, [summary(self.panels)])])


def write_report(
    path: Path,
    title: str,
    rows: Rows,
    *,
    same_noise: SameNoise | None = None,
    grids: Mapping[str, bytes] | None = None,
    metrics: Mapping[str, Metrics] | None = None,
    configs: Mapping[str, RunConfig] | None = None,
    trained: Collection[str] = (),
    provenance: Provenance | None = None,
    about: str = "",
    facts: Mapping[str, str] | None = None,
    results: Sequence[Result] = (),
    shapes: bool = True,
    findings: Sequence[str] = (),
) -> Path:
    """Write the page to ``path`` (a file, or a folder that gets report.html) and return its path.

    rows: row name -> ``Evaluation.json()``, the teacher first, the student last. same_noise: images to show. grids:
    caption -> PNG. metrics: run name -> rows of metrics.jsonl; configs: run name -> its configuration, for advice and
    reference curves. trained: names of the rewards the student was trained on; all other measures are unseen. facts:
    settings of the run. results: other evaluations of it. shapes: whether ``rows`` are expected. findings: what is wrong
    with the rewards, in sentences.
    """
    target = path if path.suffix == ".html" else path / "report.html"
    trainings = _trainings(metrics or {}, configs or {}, trained, findings)
    page = render(
        "evaluation/report.html.jinja",
        title=title,
        about=about,
        verdict=_shapes_answer(rows) if shapes else _answer(results),
        names=list(rows),
        colors=colors_of(list(rows)),
        groups=measure_groups(rows, trained),
        plots=measure_plots(rows),
        same_noise=same_noise,
        grids=[(name, _embedded(png)) for name, png in (grids or {}).items()],
        facts=facts or {},
        results=results,
        shapes=shapes,
        trainings=trainings,
        judged=[training for training in trainings if training.panels or training.findings],
        provenance=provenance or Provenance(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, page, "the report")
    return target


def _trainings(
    metrics: Mapping[str, Metrics], configs: Mapping[str, RunConfig], trained: Collection[str], findings: Sequence[str]
) -> list[Training]:
    return [
        Training(
            name,
            f"health-{k}",
            training_curves(own),
            health_panels(own, trained, describe.against_hacking(configs[name]) if name in configs else ""),
            findings,
            compared_panels(own, configs[name]) if name in configs else (),
        )
        for k, (name, own) in enumerate(metrics.items())
    ]


def report_run(folder: Path) -> Path:
    """(Re)write report.html of a run folder from its files; what is missing is left out.

    evaluation.json and the comparison in grids/ belong to the Shapes world: a real model's page has neither.
    """
    run = open_run(folder)
    cfg = load_config(RunConfig, folder / "config.yaml")
    moved = isinstance(cfg.model, DiffusersModel) and not draws_real_images(cfg.model.path)
    shapes = cfg.shapes_world or (moved and (folder / EVALUATION).is_file())  # measured where the base model was
    metrics = read_metrics(folder)
    newest, damaged = newest_intact(run.checkpoints)
    for message in () if shapes else damaged:  # measuring a Shapes run has warned already
        _log.warning("%s; %s", message, f"step {newest} is the newest that can be used" if newest else "none is left")
    return write_report(
        folder,
        f"gdmd run: {cfg.name}",
        read_rows(folder) if shapes else {},
        same_noise=read_same_noise(folder / "grids" / "comparison.png") if shapes else None,
        grids=_stored_grids(folder, averaged=cfg.loop.ema > 0),
        metrics={cfg.name: metrics},
        configs={cfg.name: cfg},
        trained=trained_on(cfg, folder),
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
        command=shlex.join(str(word) for word in found.get("command", ())),
        commit=found.get("commit"),
        seed=run.config.get("loop", {}).get("seed"),
        versions=found.get("versions", {}),
        machine=f"{found.get('platform', '')}, {found.get('cpu_count', '?')} CPU cores",
        started=found.get("started", ""),
        config=yaml.safe_dump(dict(run.config), sort_keys=False),
        inputs=input_lines(found),
        changes=change_lines(found),
        resumed_with=config_change_lines(found),
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
    """Store the evaluations of a run (row name -> ``Evaluation.json()``) for its report."""
    path = folder / EVALUATION
    write_atomic(path, json.dumps(rows, indent=2), "the evaluation")
    return path


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The evaluations that ``save_rows`` stored; empty without any. RunError for a damaged file."""
    path = folder / EVALUATION
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(row["shapeseval"], dict) for row in rows.values()):
            raise ValueError("a row without ShapesEval")
        for row in rows.values():
            scores_of(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise RunError(f"cannot read {path}: {error}. Delete it: its rows are measured again.") from error
    return dict(rows)


def _shapes_answer(rows: Rows) -> Verdict:
    if not rows:
        return Verdict("Nothing has been evaluated yet; gdmd report RUN measures the student and its teacher.")
    return shapes_verdict(rows)


def _answer(results: Sequence[Result]) -> Verdict:
    """A real model has no checker: the last comparison, else the last scores, else how to get them."""
    compared = [result for result in results if result.plots]
    if results:
        return (compared or results)[-1].verdict
    how = "gdmd eval preference RUN --prompts FILE --scorer clip"
    return Verdict(
        "Not scored yet: the page shows how the training went, but not how good the student is.",
        notes=[
            f"{how} generates images and scores them in the run folder; gdmd report RUN then shows the results here."
        ],
    )


def _stored_grids(folder: Path, *, averaged: bool) -> dict[str, bytes]:
    """The first and the last validation images of the training; ``averaged``: drawn with the EMA weights."""
    numbered = {int(path.stem[5:]): path for path in (folder / "grids").glob("step_*.png") if path.stem[5:].isdigit()}
    shown = sorted({min(numbered), max(numbered)}) if numbered else []
    student = "Student (EMA)" if averaged else "Student"
    return {f"{student} after {step:,} iterations, and the teacher": _whole(numbered[step]) for step in shown}


def _whole(path: Path) -> bytes:
    """The content of an image file. RunError for a truncated one."""
    content = path.read_bytes()
    try:
        open_image(content)
    except ValueError as error:
        raise RunError(f"{path} {error}; delete it, and the report leaves it out") from error
    return content


def _embedded(png: bytes) -> str:
    """A data URI; a grid of large images is embedded smaller."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as grid:
        if grid.width <= WIDEST:
            return data_uri(png)
        small = grid.convert("RGB").resize((WIDEST, round(grid.height * WIDEST / grid.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return data_uri(buffer.getvalue(), "jpeg")
