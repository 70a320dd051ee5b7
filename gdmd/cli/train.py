"""``gdmd train`` and ``gdmd demo``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdmd.cli.common import Json, RunFolder, messages, print_json
from gdmd.io import typed
from gdmd.training.rank import attempt, rank_info

if TYPE_CHECKING:
    from rich.console import Console

    from gdmd.config.run import RunConfig
    from gdmd.programs.train import Trained


def train_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="Recipe (name or .yaml) and overrides."),
    ] = None,
    run: RunFolder = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Continue this run, bit for bit; needs no recipe.")
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Evaluate the EMA student at the end and write report.html.")
    ] = True,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, metavar="N", help="N processes on this machine, by torchrun.")
    ] = None,
    restarts: Annotated[
        int, typer.Option("--restarts", min=0, help="With --gpus: go on by itself after a failure, so many times.")
    ] = 0,
    accept: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Resume although the prompt file, base model or a reward changed; the run records it.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Train a recipe: checkpoints, metrics.jsonl, TensorBoard, sample grids and a report in one run folder.

    Ctrl-C saves a checkpoint and exits with code 130; `gdmd train --resume FOLDER` goes on from it.

    \b
    Examples:
      gdmd train shapes_smoke                         twelve iterations, a minute
      gdmd train shapes loop.seed=1 method.gamma=0    any field by its path
      gdmd train my_recipe.yaml --run runs/mine --no-eval
      gdmd train --resume runs/shapes-seed0           or more steps: loop.steps=2000
      gdmd train shapes --gpus 4 --restarts 3         continues after a failure
      gdmd train shapes_smoke --json > finished.json

    `gdmd recipes` lists the recipes, `gdmd recipes NAME` prints every field of one.
    """
    recipe, overrides = _split_words(words or [], needed=resume is None)
    if resume is not None and run is not None:
        raise ValueError("--run and --resume were both given: --resume already names the folder of the run")
    asked = Asked(recipe, tuple(overrides), run, resume, evaluation, json, accept)
    raise typer.Exit(_run(asked, gpus or 1, restarts))


@dataclass(frozen=True)
class Asked:
    """What the words of ``gdmd train`` say."""

    recipe: str | None
    overrides: tuple[str, ...]
    run: Path | None
    resume: Path | None
    evaluation: bool
    json: bool
    accept: bool = False

    def config(self) -> RunConfig:
        """The configuration, checked."""
        if self.resume is None:
            from gdmd.recipes.read import read_recipe

            return read_recipe(str(self.recipe), self.overrides)
        from gdmd.recipes.run_folders import check_resumable

        return check_resumable(self.resume, self.recipe, self.overrides)

    def again(self) -> Asked:
        """The same words when torchrun has started the ranks again: what there is of the run is continued."""
        if self.resume is not None or not attempt():
            return self
        if self.run is None:
            raise ValueError(
                "torchrun has started the ranks again (--max-restarts), but no --run names the folder to go on with: "
                "give one, or use gdmd train --gpus N --restarts K"
            )
        return replace(self, resume=self.run, run=None) if (self.run / "config.yaml").is_file() else self

    def words(self, folder: Path) -> list[str]:
        """The same as words, for the processes that a launcher starts."""
        chosen = ["--run", str(folder)] if self.resume is None else ["--resume", str(self.resume)]
        flags = ["--eval" if self.evaluation else "--no-eval", *(["--json"] if self.json else [])]
        flags += ["--accept-changes"] if self.accept else []
        return ["train", *([self.recipe] if self.recipe else []), *self.overrides, *chosen, *flags]


def _run(asked: Asked, processes: int, restarts: int) -> int:
    if restarts and processes < 2:
        raise ValueError("--restarts belongs to --gpus N: one process alone is started again with --resume")
    return _launched(asked, processes, restarts) if processes > 1 else _train(asked)


def _launched(asked: Asked, processes: int, restarts: int) -> int:
    """Everything that can be wrong with the words is said once, here; then torchrun's launcher does the rest."""
    if rank_info().size > 1:
        raise ValueError("--gpus inside torchrun would start processes of processes: use one of the two")
    cfg = asked.config()
    from gdmd.recipes.run_folders import new_folder
    from gdmd.training.distributed import RankInfo, World, launch

    World(RankInfo(0, processes)).span(cfg.loop.batch_size)
    folder = asked.resume or asked.run or new_folder(cfg)
    code = launch(asked.words(folder), processes, restarts)
    if code not in (0, 2, 130, 143) and folder.exists():  # after a signal rank 0 has said so
        messages().print(
            f"go on with: gdmd train --resume {typed(folder)} --gpus {processes}", markup=False, soft_wrap=True
        )
    return code


def _train(asked: Asked) -> int:
    """Train in this process, alone or as one of the ranks that torchrun has started; the exit code."""
    asked = asked.again()
    cfg, console = asked.config(), messages()
    from gdmd.programs.train import go, ready, start, take_up
    from gdmd.training.distributed import session

    with session(cfg.loop.rank_timeout) as world:
        if asked.resume is None:
            again = {"evaluation": asked.evaluation, "world": world}
            trained = start(cfg, asked.run, console, command=sys.argv, accept=asked.accept, **again)
        else:
            cfg, run = take_up(asked.resume, asked.recipe, asked.overrides, world, console, accept=asked.accept)
            trained = go(cfg, run, ready(cfg, world, console), console, evaluation=asked.evaluation, world=world)
        if asked.json and world.first:
            print_json(trained.json())
        _say_end(trained, console)
        if trained.end.signal is not None:
            world.largest(0)  # a launcher ends the others when the first one has gone
    return trained.end.exit_code


def _split_words(words: list[str], *, needed: bool) -> tuple[str | None, list[str]]:
    """(recipe or None, overrides): the recipe comes first and is an existing file or holds no equals sign."""
    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return words[0], words[1:]
    if needed:
        raise ValueError("no recipe was named; write, for example, gdmd train shapes_smoke; `gdmd recipes` lists them")
    return None, words


def _say_end(trained: Trained, console: Console) -> None:
    """The last lines: what was done and what to type next."""
    if trained.end.signal is not None:
        console.print(
            f"stopped at step {trained.end.step} of {trained.steps}; checkpoint {trained.end.checkpoint} is saved. "
            f"Go on with: gdmd train --resume {typed(trained.run)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return
    said = f"finished {trained.steps} steps in {trained.seconds:.0f} s"
    overall = trained.evaluation["shapeseval"]["overall"] if trained.evaluation else None
    said += f"; ShapesEval {overall:.3f} (EMA student)" if overall is not None else ""
    console.print(said, markup=False, highlight=False)
    if trained.report:
        console.print(f"report: {trained.report}", markup=False, highlight=False, soft_wrap=True)


def demo_command(
    run: RunFolder = None,
    json: Json = False,
    recipe: Annotated[
        str, typer.Option(help="Recipe of the GDMD row; the DMD row is the same with gamma 0.")
    ] = "shapes_demo",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe.")
    ] = None,
) -> None:
    """Distill two 4-step students on the Shapes lab, DMD and GDMD, and compare them with their teacher.

    Trains and measures every row of the table in this run: at most 8 minutes on two cores. The same command with
    the same --run goes on where an interrupted demo stopped.

    \b
    Examples:
      gdmd demo
      gdmd demo --run runs/demo --json > demo.json
      gdmd demo --set loop.steps=20 --set eval.per_task=10   a quicker, rougher one
    """
    from gdmd.recipes.read import read_recipe

    cfg = read_recipe(recipe, override or [])
    from gdmd.programs.demo import run_demo
    from gdmd.recipes.run_folders import demo_folder

    console = messages()
    demo = run_demo(cfg, run or demo_folder(cfg), console)
    if demo.signal is not None:
        raise typer.Exit(128 + demo.signal)
    if json:
        print_json(demo.json())
    else:
        from gdmd.evaluation.table import print_table

        print_table(demo.rows, demo.trained)
    said = f"finished in {demo.seconds:.0f} s; report: {demo.report}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
