"""What ``gdmd demo`` does: distill DMD and GDMD from the same teacher and compare both with it, in one report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from gdmd.config.describe import trained_rewards
from gdmd.config.methods.all import without_rewards
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.config.metric_keys import check_best_metric
from gdmd.config.run import RunConfig
from gdmd.diffusion.generate import Sampler
from gdmd.evaluation.run_report import Provenance, read_rows, save_rows, write_report
from gdmd.evaluation.runs import Row, compare, load_student, measure, row_key
from gdmd.io import typed
from gdmd.programs.train import TrainSettings, run_training
from gdmd.recipes.build import Components, build
from gdmd.recipes.contents import checkpoint_content
from gdmd.recipes.open_run import student_row, teacher_row
from gdmd.recipes.run_folders import TEACHERS
from gdmd.reporting.progress_bar import phase
from gdmd.runs.run_folder import Run, check_same_config, create, open_run, read_facts, read_metrics

METHODS = ("dmd", "gdmd")


@dataclass(frozen=True)
class Demo:
    """The result: the rows of the table and the report. signal: the one that stopped it early."""

    folder: Path
    seconds: float
    rows: Mapping[str, Row] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    report: Path | None = None
    signal: int | None = None

    def json(self) -> dict[str, Any]:
        """What ``gdmd demo --json`` prints."""
        return {
            "run": str(self.folder),
            "report": str(self.report),
            "seconds": round(self.seconds, 1),
            "trained_on": list(self.trained),
            "rows": dict(self.rows),
        }


def control(cfg: RunConfig) -> RunConfig:
    """The same recipe without rewards: plain DMD with as many student updates. ValueError if it reads no rewards."""
    if cfg.model.kind != "shapes" or not isinstance(cfg.method, GDMDConfig | TiltedGDMDConfig):
        raise ValueError(
            f"the demo compares GDMD with DMD in the Shapes world, but recipe {cfg.name} has model.kind = "
            f"{cfg.model.kind} and method.kind = {cfg.method.kind}; train it with gdmd train"
        )
    plain = without_rewards(cfg.method)
    if plain is None:
        raise ValueError(f"the demo compares GDMD with DMD, but with method.gamma = 0 {cfg.name} is DMD itself")
    return cfg.model_copy(
        update={"name": f"{cfg.name}_dmd", "about": "Plain DMD with the budget of the GDMD row.", "method": plain}
    )


def run_demo(cfg: RunConfig, folder: Path, console: Console, device: str | None = None) -> Demo:
    """Train both students and measure every row; continues what an earlier call left unfinished in ``folder``."""
    configs = {"dmd": control(cfg), "gdmd": cfg}
    for own in configs.values():
        check_best_metric(own)
    began = time.perf_counter()
    with phase("loading the networks", console):
        components = {name: build(own, device) for name, own in configs.items()}
    runs = {name: _run(folder / name, own) for name, own in configs.items()}
    stages = _Stages(folder, console)
    for what in TEACHERS:
        stages.row(cfg, components["gdmd"], teacher_row(cfg, components["gdmd"], what))
    samplers = [teacher_row(cfg, components["gdmd"], what) for what in TEACHERS]
    for name in METHODS:
        stages.log(f"training {name.upper()}: {cfg.loop.steps} iterations of {cfg.loop.batch_size}, from the teacher")
        settings = TrainSettings(console, evaluation=False)
        trained = run_training(configs[name], runs[name], components[name], settings)
        if trained.end.signal is not None:
            again = f"gdmd demo --run {typed(folder)}"
            console.print(f"stopped and saved; continue with: {again}", markup=False, highlight=False, soft_wrap=True)
            return Demo(folder, time.perf_counter() - began, signal=trained.end.signal)
        load_student(components[name], runs[name].path, trained.end.step)
        samplers.append(student_row(cfg, components[name], name.upper()))
        weights = checkpoint_content(runs[name].path, trained.end.step)
        stages.row(cfg, components[name], samplers[-1], trained.end.step, weights)
    rows = {sampler.name: stages.rows[sampler.name] for sampler in samplers}
    report = _report(cfg, folder, runs, samplers, rows, components["gdmd"])
    return Demo(folder, time.perf_counter() - began, rows, trained_rewards(cfg), report)


class _Stages:
    """Logs each stage and its time, and stores the finished rows."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console, self._number = folder, console, 0
        self.rows: dict[str, Row] = dict(read_rows(folder))

    def log(self, message: str) -> None:
        self._number += 1
        of = len(TEACHERS) + 2 * len(METHODS)  # one measurement each, and one training per method
        self.console.print(f"[{self._number}/{of}] {message}", markup=False, highlight=False)

    def row(self, cfg: RunConfig, components: Components, sampler: Sampler, step: int = 0, weights: str = "") -> None:
        """Measure a sampler, unless its row is stored. weights: ``checkpoint_content``."""
        images = 6 * cfg.eval.per_task * cfg.eval.images
        self.log(f"{sampler.name} ({sampler.nfe} network calls per image) on {images} images")
        began, how = time.perf_counter(), "measured before"
        key = row_key(cfg, sampler, weights)
        if self.rows.get(sampler.name, {}).get("key") != key:
            self.rows[sampler.name] = dict(measure(cfg, components, sampler, step=step)) | {"key": key}
            save_rows(self.folder, self.rows)
            how = f"{time.perf_counter() - began:.0f} s"
        overall = self.rows[sampler.name]["shapeseval"]["overall"]
        self.console.print(f"      ShapesEval {overall:.3f} ({how})", markup=False, highlight=False)


def _run(folder: Path, cfg: RunConfig) -> Run:
    """The run folder of one method, new or to be resumed. RunError if it has another configuration."""
    config = cfg.model_dump(mode="json")
    if (folder / "config.yaml").exists():
        run = open_run(folder)
        check_same_config(run, config)
        return run
    return create(folder, config, sys.argv)


def _report(
    cfg: RunConfig,
    folder: Path,
    runs: Mapping[str, Run],
    samplers: list[Sampler],
    rows: Mapping[str, Row],
    components: Components,
) -> Path:
    """report.html of the demo, with all samplers side by side from the same noise."""
    facts = read_facts(runs["gdmd"].path)
    return write_report(
        folder,
        "gdmd demo: four steps instead of a hundred calls",
        rows,
        same_noise=compare(folder, cfg, components, samplers),
        metrics={name.upper(): read_metrics(runs[name].path) for name in METHODS},
        trained=trained_rewards(cfg),
        provenance=Provenance(
            command=" ".join(facts["command"]),
            commit=facts["commit"],
            seed=cfg.loop.seed,
            versions=facts["versions"],
            machine=f"{facts['platform']}, {facts['cpu_count']} CPU cores",
            started=facts["started"],
            config=yaml.safe_dump(dict(runs["gdmd"].config), sort_keys=False),
        ),
        about=cfg.about,
    )
