"""What ``gdmd train`` does: build the recipe, train it, evaluate the EMA student, write the report.

With several ranks (``world``) all of them build and train; rank 0 makes the folder, prints, evaluates and reports.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.data.embeddings import CachedText
from gdmd.io import SHARDS_STAY, writing
from gdmd.programs.decoders import check_decoder
from gdmd.programs.evaluate import finish_run, grid_hook
from gdmd.programs.folders import new_folder, resumed
from gdmd.programs.hub_pins import tell_commits
from gdmd.recipes.build import Lab, build, compile_networks
from gdmd.recipes.rewards import require_weights, reward_stats
from gdmd.runs.rundir import Run, create, open_run
from gdmd.shapes.grammar import catalogue
from gdmd.training.distributed import SINGLE, World
from gdmd.training.loop import Hooks, Silent, TrainEnd, train
from gdmd.training.optim8bit import require_torchao
from gdmd.training.progress import progress_for
from gdmd.training.start import require_start

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Trained:
    """What a finished or interrupted training run left behind."""

    run: Path
    end: TrainEnd
    steps: int
    seconds: float
    evaluation: Mapping[str, Any] | None = None
    report: Path | None = None

    def json(self) -> dict[str, Any]:
        """What ``gdmd train --json`` prints."""
        return {
            "run": str(self.run),
            "step": self.end.step,
            "steps": self.steps,
            "finished": self.end.signal is None,
            "checkpoint": str(self.end.checkpoint),
            "train_seconds": round(self.seconds, 2),
            "report": str(self.report) if self.report else None,
            "evaluation": self.evaluation,
        }


def start(
    cfg: RunConfig,
    folder: Path | None,
    console: Console,
    *,
    evaluation: bool,
    command: Sequence[str],
    world: World = SINGLE,
) -> Trained:
    """Train a recipe in a new folder. Everything that can be wrong with the input is found before it is made."""
    lab = ready(cfg, world, console)

    def make() -> str:
        return str(create(folder or new_folder(cfg), cfg.model_dump(mode="json"), command).path)

    return go(cfg, open_run(Path(world.on_first(make))), lab, console, evaluation=evaluation, world=world)


def take_up(folder: Path, recipe: str | None, overrides: Sequence[str], world: World) -> tuple[RunConfig, Run]:
    """The run to continue: rank 0 writes what has changed in its configuration, then all read it."""
    world.on_first(lambda: str(resumed(folder, recipe, overrides)[1].path))
    return resumed(folder, recipe, overrides)


def ready(cfg: RunConfig, world: World = SINGLE, console: Console = QUIET) -> Lab:
    """The live objects of a recipe, its prompts checked to the last line and, where they have a folder, embedded."""
    if world.size > 1:
        world.span(cfg.loop.batch_size)
    check_prompts(cfg)
    if cfg.method.rewarded:
        require_weights(cfg.rewards)
    require_start(cfg.loop.start_from)
    if cfg.loop.optimizer == "adamw8bit":
        require_torchao()
    lab = build(cfg)
    compile_networks(cfg, lab)
    if isinstance(lab.encoder, CachedText):
        encoder, texts = lab.encoder, [text for group in lab.stream.groups for text in group]
        world.on_first(lambda: embed(encoder, texts, console))  # the cache is of all ranks: one of them writes it
        if not world.first:
            encoder.refresh()
            encoder.prepare(texts)
    return lab


def embed(encoder: CachedText, texts: Sequence[str], console: Console = QUIET) -> None:
    """The captions that are not on disk yet, which takes a while: how many is said, and on a terminal how far it is."""
    count = len(encoder.missing(texts))
    if count:
        console.print(f"embedding {count} prompts once into {encoder.folder}", markup=False, highlight=False)
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn())
    with (
        writing("the text embeddings", encoder.folder, SHARDS_STAY, "model.embeddings"),
        Progress(*columns, console=console, disable=not (count and console.is_terminal), transient=True) as progress,
    ):
        bar = progress.add_task("prompts", total=count)
        encoder.prepare(texts, lambda done: progress.advance(bar, done))


def check_prompts(cfg: RunConfig) -> None:
    """ValueError with file and line for a prompt that is no caption of the Shapes language."""
    from gdmd.data.prompts import prompt_file, read_prompts

    if cfg.prompts.file is None or cfg.model.kind != "shapes":
        return
    table = catalogue()
    for number, text in enumerate(read_prompts(prompt_file(cfg.prompts.file)), 1):
        try:
            table.row(text)
        except ValueError as error:
            raise ValueError(f"prompt file {cfg.prompts.file}, line {number}: {error}") from error


def go(cfg: RunConfig, run: Run, lab: Lab, console: Console, *, evaluation: bool, world: World = SINGLE) -> Trained:
    """Train ``run`` from where it stands to its last step; then evaluate and report unless it was interrupted."""
    console.print(f"{cfg.name}: {cfg.about}" if cfg.about else cfg.name, markup=False, highlight=False)
    console.print(f"run folder {run.path}", markup=False, highlight=False)
    model = cfg.model
    if isinstance(model, DiffusersModel):
        world.on_first(lambda: tell_commits(model, run, console))
    world.on_first(lambda: check_decoder(cfg, lab, run.path, console))
    began = time.perf_counter()
    with progress_for(cfg.loop.steps, console) as progress:
        watcher = progress if world.first else Silent()
        hooks = Hooks(watcher, grid_hook(lab, cfg), lambda: reward_stats(lab.rewards))
        end = train(lab.method, lab.roles, lab.stream, cfg.loop, run, hooks, world)
    trained = Trained(run.path, end, cfg.loop.steps, time.perf_counter() - began)
    if end.signal is not None or not evaluation or not world.first:
        return trained
    if cfg.model.kind != "shapes":
        console.print(f"write the student for diffusers with: gdmd export {run.path}", markup=False, highlight=False)
        return trained
    console.print("evaluating the EMA student on the fixed evaluation set", markup=False)
    whole = lab if world.size == 1 else build(cfg)  # the other ranks have gone, and with them their shards
    row, report = finish_run(cfg, run.path, whole, end.step)
    return Trained(run.path, end, cfg.loop.steps, trained.seconds, row, report)
