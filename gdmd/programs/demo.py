"""What ``gdmd demo`` does: train DMD and GDMD from the same start and compare both with their teacher, in one report.

The start is the shipped DMD student (the first stage of two), or with loop.start_from = "" the teacher.
"""

from __future__ import annotations

import math
import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from gdmd.config.describe import counted, trained_rewards
from gdmd.config.methods.all import without_rewards
from gdmd.config.methods.gdmd import GDMDConfig
from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.config.metric_keys import check_best_metric
from gdmd.config.run import RunConfig
from gdmd.evaluation.run_report import Provenance, read_rows, save_rows, write_report
from gdmd.evaluation.runs import Row, compare
from gdmd.evaluation.verdict import Estimate, is_teacher, paired
from gdmd.io import typed, writing
from gdmd.programs.demo_work import (
    METHODS,
    Measured,
    Share,
    in_two_processes,
    open_or_create,
    references_of,
    start,
    student_of,
    two_processes,
    updates,
    work,
)
from gdmd.reporting.progress_bar import phase
from gdmd.reporting.tables import difference
from gdmd.runs.process import run_lock
from gdmd.runs.run_folder import Run, read_facts, read_metrics
from gdmd.runs.student_file import read_student_file, student_file


@dataclass(frozen=True)
class Demo:
    """The result: the rows of the table, GDMD minus teacher and minus DMD, and the report.

    signal: the one that stopped it early.
    """

    folder: Path
    seconds: float
    rows: Mapping[str, Row] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    report: Path | None = None
    signal: int | None = None

    @property
    def differences(self) -> dict[str, Estimate]:
        """ShapesEval of GDMD minus that of the teacher with most calls, and of DMD; paired by caption and noise."""
        names = list(self.rows)
        teacher = max(filter(is_teacher, names), key=lambda name: self.rows[name]["nfe"])
        found = {name: paired(self.rows[names[-1]], self.rows[name]) for name in (teacher, names[-2])}
        return {name: one for name, one in found.items() if one is not None}

    def json(self) -> dict[str, Any]:
        """What ``gdmd demo --json`` prints."""
        return {
            "run": str(self.folder),
            "report": str(self.report),
            "seconds": round(self.seconds, 1),
            "trained_on": list(self.trained),
            "rows": dict(self.rows),
            "gdmd_minus": {name: asdict(one) for name, one in self.differences.items()},
        }

    def conclusion(self) -> list[str]:
        """Both differences with their intervals, and in words what they show; lines of at most 80 columns."""
        lines, shown = [], []
        for name, one in self.differences.items():
            who = f"{name.split(',')[0]} with {self.rows[name]['nfe']} calls"
            lines.append(f"GDMD minus {who + ':':<24} {difference(one.mean, one.low, one.high)}")
            shown.append(
                f"above {who}"
                if one.sign > 0
                else f"below {who}"
                if one.sign < 0
                else f"not shown to be above {who}, because "
                + ("so few captions give no interval" if math.isnan(one.low) else "the interval includes 0")
            )
        own = f"GDMD with {list(self.rows.values())[-1]['nfe']} calls is {', and '.join(shown)}."
        return [*lines, *textwrap.wrap(own, 80)]


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
    """Train both students and measure every row; continues what an earlier call left unfinished in ``folder``.

    RunError if another process works there.
    """
    configs = {"dmd": control(cfg), "gdmd": cfg}
    for own in configs.values():
        check_best_metric(own)
    with writing("the demo", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        return _run(configs, folder, console, device)


def _run(configs: Mapping[str, RunConfig], folder: Path, console: Console, device: str | None) -> Demo:
    began, cfg = time.perf_counter(), configs["gdmd"]
    runs = {name: open_or_create(folder / name, own) for name, own in configs.items()}
    if two_processes(cfg, device):
        signal = in_two_processes(configs, folder, console)
    else:
        signal = work(configs, folder, Share(METHODS, folder, references=True), console, device)
    if signal is not None:
        again = f"continue with the same command and --run {typed(folder)}"
        console.print(f"stopped and saved; {again}", markup=False, highlight=False, soft_wrap=True)
        return Demo(folder, time.perf_counter() - began, signal=signal)
    with phase("loading the networks", console):
        shown = [*references_of(cfg, device), *(student_of(configs[name], folder, name, device) for name in METHODS)]
    stored = read_rows(folder / "dmd") | read_rows(folder)
    rows = {one.sampler.name: stored[one.sampler.name] for one in shown}
    save_rows(folder, rows)
    with phase("generating images and writing the report", console):
        report = _report(cfg, folder, runs, shown, rows)
    return Demo(folder, time.perf_counter() - began, rows, trained_rewards(cfg), report)


def _report(
    cfg: RunConfig,
    folder: Path,
    runs: Mapping[str, Run],
    shown: Sequence[Measured],
    rows: Mapping[str, Row],
) -> Path:
    """report.html of the demo, with all samplers side by side from the same noise."""
    facts = read_facts(runs["gdmd"].path)
    return write_report(
        folder,
        "gdmd demo: four steps instead of a hundred calls",
        rows,
        same_noise=compare(folder, cfg, shown[0].components, [one.sampler for one in shown]),
        metrics={name.upper(): read_metrics(runs[name].path) for name in METHODS},
        configs={"DMD": control(cfg), "GDMD": cfg},
        trained=trained_rewards(cfg),
        provenance=Provenance(
            command=shlex.join(facts["command"]),
            commit=facts["commit"],
            seed=cfg.loop.seed,
            versions=facts["versions"],
            machine=f"{facts['platform']}, {facts['cpu_count']} CPU cores",
            started=facts["started"],
            config=yaml.safe_dump(dict(runs["gdmd"].config), sort_keys=False),
        ),
        about=_about(cfg),
    )


def _about(cfg: RunConfig) -> str:
    """The stages in a few sentences."""
    trained = f"{counted(updates(cfg), 'update')} each of DMD and of GDMD, both from {start(cfg)}"
    if not (file := student_file(cfg.loop.start_from)):
        return f"One stage: {trained}."
    facts = read_student_file(file).metadata
    return (
        f"First stage, run earlier and shipped with the package: {facts['updates']:,} updates of DMD ({facts['command']}). "
        f"Second stage, here: {trained}."
    )
