"""What ``gdmd train`` does: build the recipe, train it, evaluate the EMA student, write the report.

With several ranks (``world``) all of them build and train; rank 0 makes the folder, prints, evaluates and reports.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from gdmd.config.describe import length, student
from gdmd.config.metric_keys import check_best_metric
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.data.prompts import read_prompts
from gdmd.data.text_cache import CachedText
from gdmd.evaluation.run_report import report_run
from gdmd.evaluation.runs import finish_run, grid_hook
from gdmd.io import SHARDS_STAY, typed, writing
from gdmd.programs.decoder_check import check_decoder
from gdmd.recipes.build import Components, build, compile_networks
from gdmd.recipes.build_rewards import reason_unscored, require_weights, reward_stats, try_rewards
from gdmd.recipes.hub_revisions import record_commits
from gdmd.recipes.inputs import check_inputs, check_start
from gdmd.recipes.long_prompts import warn_long_prompts
from gdmd.recipes.run_folders import check_resumable, new_folder, resumed
from gdmd.runs.run_folder import Run, create, open_run
from gdmd.shapes.grammar import catalog
from gdmd.training.adamw8bit import require_torchao
from gdmd.training.distributed import SINGLE, World
from gdmd.training.loop import Hooks, Silent, TrainEnd, train
from gdmd.training.progress import progress_for
from gdmd.training.warm_start import check_model, check_roles, require_start

QUIET = Console(quiet=True)
AFTER = {
    "score the student": "eval preference {run} --prompts FILE --scorer clip",
    "export it for diffusers": "export {run}",
}
"""What comes after the training of a real model, which has no built-in evaluation."""


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
    accept: bool = False,
) -> Trained:
    """Train a recipe in a new folder. Everything that can be wrong with the input is found before it is made.

    ``accept``: loop.start_from may be a run of another base model.
    """
    require_start(cfg.loop.start_from)
    check_model(cfg.loop.start_from, cfg.model_dump(mode="json"))
    world.on_first(lambda: check_start(cfg, accept=accept))
    components = ready(cfg, world, console)
    check_roles(cfg.loop.start_from, components.roles)

    def make() -> str:
        return str(create(folder or new_folder(cfg), cfg.model_dump(mode="json"), command).path)

    return go(cfg, open_run(Path(world.on_first(make))), components, console, evaluation=evaluation, world=world)


def take_up(
    folder: Path,
    recipe: str | None,
    overrides: Sequence[str],
    world: World,
    console: Console = QUIET,
    *,
    accept: bool = False,
) -> tuple[RunConfig, Run]:
    """The run to continue: rank 0 checks its inputs and writes what has changed in its configuration, then all read it.

    RunError for inputs whose content changed, unless ``accept``.
    """

    def settle() -> None:
        cfg = check_resumable(folder, recipe, overrides)
        check_inputs(cfg, open_run(folder), console, accept=accept)
        resumed(folder, recipe, overrides)

    world.on_first(settle)
    return resumed(folder, recipe, overrides)


def ready(cfg: RunConfig, world: World = SINGLE, console: Console = QUIET) -> Components:
    """The live objects of a recipe, its prompts checked to the last line and, where they have a folder, embedded."""
    if world.size > 1:
        world.span(cfg.loop.batch_size)
    check_best_metric(cfg)
    check_prompts(cfg, console)
    if cfg.method.rewarded:
        require_weights(cfg.rewards)
    if cfg.loop.optimizer == "adamw8bit":
        require_torchao()
    components = build(cfg)
    world.on_first(lambda: _try_rewards(cfg, components))
    compile_networks(cfg, components)
    texts = [text for group in components.stream.groups for text in group]
    warn_long_prompts(components, texts, say=world.first)
    if isinstance(components.encoder, CachedText):
        encoder = components.encoder
        world.on_first(lambda: embed(encoder, texts, console))  # the cache is of all ranks: one of them writes it
        if not world.first:
            encoder.refresh()
            encoder.prepare(texts)
    return components


def _try_rewards(cfg: RunConfig, components: Components) -> None:
    if not cfg.method.rewarded:
        return
    device = next(iter(components.roles.parameters("student").values())).device
    if isinstance(cfg.model, DiffusersModel):
        size = (cfg.model.height, cfg.model.width)
    else:
        height, width = components.codec.decode(torch.zeros(1, *components.latent_shape, device=device)).shape[2:]
        size = (height, width)
    meta = components.stream.meta[0][0] if components.stream.meta else None
    try_rewards(components.rewards, size, components.stream.groups[0][0], meta, str(device))


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


def check_prompts(cfg: RunConfig, console: Console = QUIET) -> None:
    """Say what the prompt file's reader skipped; ValueError with its line for a prompt outside the Shapes language."""
    if cfg.prompts.file is None:
        return
    found = read_prompts(cfg.prompts.file, cfg.prompts.column)
    if note := found.note():
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if cfg.model.kind != "shapes":
        return
    table = catalog()
    for prompt in found.prompts:
        try:
            table.row(prompt.text)
        except ValueError as error:
            raise ValueError(f"prompt file {cfg.prompts.file}, {prompt.where}: {error}") from error


def go(
    cfg: RunConfig, run: Run, components: Components, console: Console, *, evaluation: bool, world: World = SINGLE
) -> Trained:
    """Train ``run`` from where it stands to its last step; then evaluate and report unless it was interrupted."""
    console.print(f"{cfg.name}: {cfg.about}" if cfg.about else cfg.name, markup=False, highlight=False)
    console.print(f"{student(cfg)}; {length(cfg)}", markup=False, highlight=False)
    console.print(f"run folder {run.path}", markup=False, highlight=False)
    world.on_first(lambda: check_inputs(cfg, run, console))  # again after a resume: hub ids are resolved by now
    model = cfg.model
    if isinstance(model, DiffusersModel):
        world.on_first(lambda: record_commits(model, run, console))
    world.on_first(lambda: check_decoder(cfg, components, run.path, console))
    began = time.perf_counter()
    with progress_for(cfg.loop.steps, console) as progress:
        watcher = progress if world.first else Silent()
        scorer = getattr(components.method, "scorer", None)  # of the methods that read rewards

        def stats() -> Mapping[str, Any]:
            return {**reward_stats(components.rewards), **(scorer.stats() if scorer else {})}

        hooks = Hooks(
            watcher, grid_hook(components, cfg), stats, lambda name: reason_unscored(components.rewards, name)
        )
        end = train(components.method, components.roles, components.stream, cfg.loop, run, hooks, world)
    trained = Trained(run.path, end, cfg.loop.steps, time.perf_counter() - began)
    if end.signal is not None or not evaluation or not world.first:
        return trained
    if cfg.model.kind != "shapes":
        for what, words in AFTER.items():
            said = f"{what} with: gdmd {words.format(run=typed(run.path))}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
        return replace(trained, report=report_run(run.path))
    console.print("evaluating the EMA student on the fixed evaluation set", markup=False)
    whole = components if world.size == 1 else build(cfg)  # the other ranks have gone, and with them their shards
    row, report = finish_run(cfg, run.path, whole, end.step)
    return replace(trained, evaluation=row, report=report)
