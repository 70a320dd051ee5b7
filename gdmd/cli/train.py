"""``gdmd train`` and ``gdmd demo``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdmd.cli.common import Device, Json, RunFolder, log, messages, print_json
from gdmd.io import typed
from gdmd.reporting.progress_bar import phase
from gdmd.training.rank import RankInfo, rank_info, restart_count

if TYPE_CHECKING:
    from gdmd.config.run import RunConfig
    from gdmd.programs.train import TrainOutput


def train_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="Recipe (name or .yaml) and overrides."),
    ] = None,
    run: RunFolder = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Resume this run, bit for bit; needs no recipe.")
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Evaluate the EMA student at the end and write report.html.")
    ] = True,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, metavar="N", help="Start N processes on this machine with torchrun.")
    ] = None,
    restarts: Annotated[
        int,
        typer.Option("--restarts", min=0, help="With --gpus: restart after a failure, at most this many times."),
    ] = 0,
    accept: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Resume even if the prompt file, base model or a reward changed; the run records it.",
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="ORG/NAME",
            help="At the end, export the student and upload it to the Hugging Face Hub.",
        ),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train a recipe: checkpoints, metrics.jsonl, trackers, validation images and a report in one run folder.

    Ctrl-C saves a checkpoint and exits with code 130; `gdmd train --resume FOLDER` continues from it.

    \b
    Examples:
      gdmd train shapes_smoke                         twelve iterations, a minute
      gdmd train shapes loop.seed=1 method.gamma=0    any field by its path
      gdmd train my_recipe.yaml --run runs/mine --no-eval
      gdmd train --resume runs/shapes-seed0           longer: add loop.steps=2000
      gdmd train shapes --gpus 4 --restarts 3         restarts after a failure
      gdmd train shapes_smoke --json > finished.json

    `gdmd recipes` lists the recipes, `gdmd recipes NAME` prints every field of one.
    """
    recipe, overrides = _split_arguments(arguments or [], needed=resume is None)
    if resume is not None and run is not None:
        raise ValueError("--run and --resume were both given: --resume already names the folder of the run")
    if device is not None and (gpus or rank_info().size > 1):
        raise ValueError(
            f"--device {device} is for a single process: with --gpus or torchrun each rank uses the GPU of its local rank; "
            "leave --device out"
        )
    options = TrainOptions(recipe, tuple(overrides), run, resume, evaluation, json, accept, device, push)
    raise typer.Exit(_run(options, gpus or 1, restarts))


@dataclass(frozen=True)
class TrainOptions:
    """The arguments of ``gdmd train``."""

    recipe: str | None
    overrides: tuple[str, ...]
    run: Path | None
    resume: Path | None
    evaluation: bool
    json: bool
    accept: bool = False
    device: str | None = None
    push: str | None = None

    def config(self) -> RunConfig:
        """The configuration, checked."""
        if self.resume is None:
            from gdmd.recipes.read import read_recipe

            return read_recipe(str(self.recipe), self.overrides)
        from gdmd.recipes.run_folders import check_resumable

        return check_resumable(self.resume, self.recipe, self.overrides)

    def after_restart(self) -> TrainOptions:
        """The same options if torchrun has restarted the ranks: resume the run if its folder was created."""
        if self.resume is not None or not restart_count():
            return self
        if self.run is None:
            raise ValueError(
                "torchrun has restarted the ranks (--max-restarts), but no --run names the folder to resume: give one, "
                "or use gdmd train --gpus N --restarts K"
            )
        return replace(self, resume=self.run, run=None) if (self.run / "config.yaml").is_file() else self

    def arguments(self, folder: Path) -> list[str]:
        """The options as arguments, for the processes that torchrun starts."""
        chosen = ["--run", str(folder)] if self.resume is None else ["--resume", str(self.resume)]
        flags = ["--eval" if self.evaluation else "--no-eval", *(["--json"] if self.json else [])]
        flags += ["--accept-changes"] if self.accept else []
        flags += ["--push-to-hub", self.push] if self.push else []
        return ["train", *([self.recipe] if self.recipe else []), *self.overrides, *chosen, *flags]


def _run(options: TrainOptions, processes: int, restarts: int) -> int:
    if restarts and processes < 2:
        raise ValueError("--restarts needs --gpus N: resume a single process with --resume")
    return _launch(options, processes, restarts) if processes > 1 else _train(options)


def _launch(options: TrainOptions, processes: int, restarts: int) -> int:
    """Check all arguments once, here; torchrun's launcher does the rest. Returns the exit code."""
    if rank_info().size > 1:
        raise ValueError("--gpus inside torchrun would start processes within processes: use one of the two")
    cfg = options.config()
    from gdmd.recipes.run_folders import new_folder
    from gdmd.training.distributed import DistributedContext, launch

    DistributedContext(RankInfo(0, processes)).local_slice(cfg.loop.batch_size)
    folder = options.resume or options.run or new_folder(cfg)
    code = launch(options.arguments(folder), processes, restarts, cfg.loop.rank_timeout)
    if code not in (0, 2, 130, 143) and folder.exists():  # after a signal rank 0 has printed it
        hint = f"resume with: gdmd train --resume {typed(folder)} --gpus {processes}"
        log(hint)
    return code


def _train(options: TrainOptions) -> int:
    """Train in this process, alone or as one of the ranks that torchrun has started; the exit code."""
    options = options.after_restart()
    cfg, console = options.config(), messages()
    with phase("starting", console, plain=False):  # importing torch
        from gdmd.programs.train import TrainSettings
        from gdmd.trainer import DistillationTrainer
        from gdmd.training.distributed import session

    if options.push is not None:
        from gdmd.export.upload import check_hub_target

        if cfg.model.kind != "diffusers":
            raise ValueError(
                "--push-to-hub uploads a diffusers LoRA, and a run of the Shapes networks has none; leave it out"
            )

        check_hub_target(options.push)
    with session() as context:
        settings = TrainSettings(
            console, context, device=options.device, evaluation=options.evaluation, accept=options.accept
        )
        trainer = DistillationTrainer.from_recipe(cfg, options.resume or options.run, settings=settings)
        trained = trainer.train(resume_from_checkpoint=options.resume is not None)
        url = None
        if options.push is not None and context.is_main and trained.end.step == trained.steps:
            url = trainer.push_to_hub(options.push)
            log(f"uploaded to {url}")
        if options.json and context.is_main:
            print_json({**trained.json(), **({"url": url} if url else {})})
        _print_end(trained)
        if trained.end.signal is not None:
            context.barrier()  # a launcher ends the others when the first one has exited
    return trained.end.exit_code


def _split_arguments(arguments: list[str], *, needed: bool) -> tuple[str | None, list[str]]:
    """(recipe or None, overrides): the recipe comes first and is an existing file or holds no equals sign."""
    if arguments and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        return arguments[0], arguments[1:]
    if needed:
        raise ValueError("no recipe was named; write, for example, gdmd train shapes_smoke; `gdmd recipes` lists them")
    return None, arguments


def _print_end(trained: TrainOutput) -> None:
    """The last lines: what was done, and the next command."""
    from gdmd.config.describe import counted

    if trained.end.signal is not None:
        log(
            f"stopped at step {trained.end.step} of {trained.steps}; checkpoint {trained.end.checkpoint} is saved. "
            f"Resume with: gdmd train --resume {typed(trained.run)}"
        )
        return
    message = f"finished {counted(trained.end.step, 'step')} in {trained.seconds:.0f} s"
    if trained.end.stopped:
        message = (
            f"a callback stopped the run at step {trained.end.step} of {trained.steps}; resume with: "
            f"gdmd train --resume {typed(trained.run)}"
        )
    overall = trained.evaluation["shapeseval"]["overall"] if trained.evaluation else None
    message += f"; ShapesEval {overall:.3f} (EMA student)" if overall is not None else ""
    log(message)
    if trained.report:
        log(f"report: {trained.report}")


def demo_command(
    run: RunFolder = None,
    device: Device = None,
    json: Json = False,
    scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Start both from the teacher, not from the shipped DMD student.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of the GDMD student; the DMD student uses the same with gamma 0.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a field of the recipe; may be repeated."),
    ] = None,
) -> None:
    """Distill two 4-step students on the Shapes world, DMD and GDMD, and compare them with their teacher.

    Both continue a DMD student that ships with the package (shapes:dmd, 4,000 updates), for the same number of updates.
    Every row of the table is measured here: about 5 minutes on two cores. The same command with the same --run
    continues an interrupted demo.

    \b
    Examples:
      gdmd demo
      gdmd demo --run runs/demo --json > demo.json
      gdmd demo --set loop.seed=1                           another seed
      gdmd demo --set loop.steps=20 --set eval.per_task=10  faster, less precise
      gdmd demo --from-scratch                              no shipped student
    """
    from gdmd.recipes.run_folders import demo_folder, demo_recipe

    cfg = demo_recipe(recipe, override or [], from_scratch=scratch)
    from gdmd.programs.demo import run_demo

    demo = run_demo(cfg, run or demo_folder(cfg), messages(), device)
    if demo.signal is not None:
        raise typer.Exit(128 + demo.signal)
    if json:
        print_json(demo.json())
    else:
        from gdmd.evaluation.table import print_table

        print_table(demo.rows, demo.trained)
        print("\n".join(demo.conclusion()))
    log(f"finished in {demo.seconds:.0f} s; report: {demo.report}")
