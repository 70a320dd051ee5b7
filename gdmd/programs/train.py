"""What ``gdmd train`` does: build the recipe, train it, evaluate the EMA student, write the report.

With several ranks all of them build and train; rank 0 creates the folder, prints, evaluates and reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from gdmd.config.describe import counted, length, student
from gdmd.config.methods.dmdr import DMDRConfig
from gdmd.config.methods.gdmd_tilted import TiltedGDMDConfig
from gdmd.config.metric_keys import check_best_metric
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RewardConfig, RunConfig
from gdmd.config.too_short import too_short
from gdmd.data.prompt_files import teacher_prompt
from gdmd.data.prompts import read_prompts
from gdmd.data.text_cache import CachedText
from gdmd.diffusion.device import pick_device
from gdmd.evaluation.run_report import report_run
from gdmd.evaluation.runs import evaluation_captions, finish_run
from gdmd.evaluation.validation import Validation, validation_prompts
from gdmd.export.upload import check_hub_target, push_checkpoint
from gdmd.io import SHARDS_STAY, all_errors, typed, writing
from gdmd.methods.gains import gains_hook
from gdmd.programs.decoder_check import check_decoder
from gdmd.recipes.build import Components, build, compile_networks
from gdmd.recipes.build_data import require_prompts
from gdmd.recipes.build_rewards import (
    check_functions,
    reason_unscored,
    require_weights,
    reward_stats,
    try_rewards,
    without_stats,
)
from gdmd.recipes.hub_revisions import record_commits
from gdmd.recipes.inputs import check_inputs, check_start
from gdmd.recipes.long_prompts import warn_long_prompts
from gdmd.recipes.objects import NOTHING_GIVEN, PYTHON, GivenObjects
from gdmd.recipes.run_folders import check_resumable, new_folder, resumed
from gdmd.reporting.progress_bar import phase
from gdmd.runs.process import run_lock
from gdmd.runs.run_folder import Run, check_new, create, open_run
from gdmd.runs.trained_on import note_start
from gdmd.shapes.grammar import catalog
from gdmd.training.adamw8bit import require_torchao
from gdmd.training.callbacks import TrainerCallback
from gdmd.training.displacement import displacement_hook
from gdmd.training.distributed import SINGLE_PROCESS, DistributedContext
from gdmd.training.hub_checkpoints import HubCheckpoints
from gdmd.training.loop import Hooks, NoProgress, TrainEnd, train
from gdmd.training.progress import progress_for
from gdmd.training.trackers import check_trackers
from gdmd.training.warm_start import check_model, check_roles, require_start

if TYPE_CHECKING:
    from gdmd.models.roles import DiffusersRoles

QUIET = Console(quiet=True)
SCORE = "score the student with: gdmd eval preference {source} --prompts FILE --scorer clip"
"""The next step after the training of a real model, which has no built-in evaluation."""
EXPORT = "export it for diffusers with: gdmd export {run}{base}"
"""The next step after the training of any diffusers pipeline."""
SAVE = "the base pipeline exists only in memory: save it to a FOLDER, which the next commands need"
"""The first step after the training of a pipeline that was not loaded from a folder or hub id."""


@dataclass(frozen=True)
class TrainSettings:
    """What a training needs besides its recipe.

    given: Python objects that stand for parts of the recipe. callbacks: called by the loop. device: default a GPU, if there
    is one. evaluation: measure the student of a Shapes run at its end. accept: train on although an input has changed.
    """

    console: Console = QUIET
    context: DistributedContext = SINGLE_PROCESS
    given: GivenObjects = NOTHING_GIVEN
    callbacks: Sequence[TrainerCallback] = ()
    device: str | None = None
    evaluation: bool = True
    accept: bool = False

    def say(self, message: str) -> None:
        """Print a message as it is."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)


DEFAULTS = TrainSettings()


@dataclass(frozen=True)
class TrainOutput:
    """The outcome of a finished or interrupted training run.

    run: its folder. end: the last step, its checkpoint, and whether a signal or a callback stopped it. steps: those asked
    for. evaluation: ShapesEval and scores of a run of the Shapes world. report: report.html. components: the networks.
    """

    run: Path
    end: TrainEnd
    steps: int
    seconds: float
    evaluation: Mapping[str, Any] | None = None
    report: Path | None = None
    components: Components | None = field(default=None, repr=False)

    def json(self) -> dict[str, Any]:
        """The output of ``gdmd train --json``."""
        return {
            "run": str(self.run),
            "step": self.end.step,
            "steps": self.steps,
            "finished": self.end.signal is None and not self.end.stopped,
            "checkpoint": str(self.end.checkpoint),
            "train_seconds": round(self.seconds, 2),
            "report": str(self.report) if self.report else None,
            "evaluation": self.evaluation,
        }


def create_run(
    cfg: RunConfig, folder: Path | None, command: Sequence[str], settings: TrainSettings = DEFAULTS
) -> TrainOutput:
    """Train a recipe in a new folder. All errors of the input are found before the folder is created.

    RunError for a folder in which another process trains.
    """
    context = settings.context
    require_start(cfg.loop.start_from)
    check_model(cfg.loop.start_from, cfg.model_dump(mode="json"))
    context.on_main(lambda: check_start(cfg, accept=settings.accept, given=settings.given))
    config = cfg.model_dump(mode="json")
    components = prepare(cfg, settings, lambda: check_new(folder or new_folder(cfg), config))
    check_roles(cfg.loop.start_from, components.roles)

    with ExitStack() as held:

        def new_run() -> str:
            path = folder or new_folder(cfg)
            check_new(path, config)
            with writing("the run folder", path):
                path.mkdir(parents=True, exist_ok=True)
            held.enter_context(run_lock(path))
            return str(create(path, config, command).path)

        run = open_run(Path(context.on_main(new_run)))
        return run_training(cfg, run, components, settings)


def resume_run(
    folder: Path,
    recipe: str | RunConfig | None,
    overrides: Sequence[str] = (),
    settings: TrainSettings = DEFAULTS,
) -> tuple[RunConfig, Run]:
    """The run to continue: rank 0 checks its inputs and writes what changed in its configuration, then all read it.

    RunError for inputs whose content changed, unless they are accepted.
    """

    def settle() -> None:
        cfg = check_resumable(folder, recipe, overrides)
        check_inputs(cfg, open_run(folder), settings.console, accept=settings.accept, given=settings.given)
        resumed(folder, recipe, overrides)

    settings.context.on_main(settle)
    return resumed(folder, recipe, overrides)


def resume_training(folder: Path, recipe: RunConfig, settings: TrainSettings = DEFAULTS) -> TrainOutput:
    """Continue the run in ``folder``. RunError if another process trains it."""
    with ExitStack() as held:

        def hold() -> None:
            open_run(folder)
            held.enter_context(run_lock(folder))

        settings.context.on_main(hold)
        cfg, run = resume_run(folder, recipe, settings=settings)
        return run_training(cfg, run, prepare(cfg, settings), settings)


def prepare(
    cfg: RunConfig, settings: TrainSettings = DEFAULTS, check: Callable[[], object] | None = None
) -> Components:
    """The live objects of a recipe: every prompt is checked and, if the recipe names a cache, encoded.

    What can be checked without loading or downloading anything, and ``check``, is reported in one error.
    """
    context, console = settings.context, settings.console
    rewards = (*(cfg.rewards if cfg.method.rewarded else ()), *cfg.held_out)
    context.on_main(lambda: _check_without_loading(cfg, settings, rewards, check))
    validated, meta = validation_prompts(cfg)
    require_weights(rewards)
    if cfg.loop.optimizer == "adamw8bit":
        require_torchao()
    if cfg.loop.push_checkpoints:
        context.on_main(lambda: check_hub_target(cfg.loop.push_checkpoints))
    with phase("loading the networks", console):
        components = build(cfg, settings.device, settings.given)
    if context.size > 1 and isinstance(cfg.model, DiffusersModel):
        family = cast("DiffusersRoles", components.roles).student.family
        check_equal_calls(cfg, cfg.loop.batch_size // context.size, row_by_row=family.row_by_row)
    if cfg.method.rewarded or cfg.held_out:
        with phase("trying the rewards on two images", console):
            context.on_main(lambda: _try_rewards(cfg, components, validated[:1], meta))
    compile_networks(cfg, components)  # in the first iteration
    texts = [*validated, *(text for group in components.stream.groups for text in group)]
    teacher = components.stream.teacher_prompts
    warn_long_prompts(components, texts, teacher, say=context.is_main)
    if isinstance(components.encoder, CachedText):
        encoder = components.encoder
        known = [*texts, *teacher, *evaluation_captions(cfg)]
        context.on_main(lambda: encode(encoder, known, console))  # the ranks share the cache: one of them writes it
        if not context.is_main:
            encoder.refresh()
            encoder.prepare(known)
    return components


def _check_without_loading(
    cfg: RunConfig,
    settings: TrainSettings,
    rewards: Sequence[RewardConfig],
    check: Callable[[], object] | None,
) -> None:
    """One ValueError for all mistakes that can be seen without loading or downloading anything, and in ``check``."""
    start, stop = settings.context.local_slice(cfg.loop.batch_size)
    all_errors(
        *((check,) if check else ()),
        lambda: settings.context.size == 1 or check_equal_calls(cfg, stop - start),
        lambda: check_mixture(cfg, settings.context.size),
        lambda: pick_device(settings.device),
        lambda: check_best_metric(cfg),
        lambda: check_prompts(cfg, settings),
        lambda: validation_prompts(cfg),
        lambda: check_places(cfg, settings),
        lambda: check_functions(rewards),
        lambda: check_trackers(cfg.loop.report_to),
    )


def check_equal_calls(cfg: RunConfig, samples: int, *, row_by_row: bool = False) -> None:
    """ValueError if ranks of so many samples would call a sharded student unequally often: FSDP would wait forever.

    With a step tau per sample, a call of the rollout has a different number of samples on every rank; forward_chunk, or
    a network that is called for each row, splits it into a different number of calls.
    """
    model, method = cfg.model, cfg.method
    if not isinstance(model, DiffusersModel) or model.full not in ("student", "both") or cfg.loop.sharding == "none":
        return
    continued = method.student_input == "simulation" or isinstance(method, TiltedGDMDConfig)
    rows = 1 if row_by_row else model.forward_chunk
    if not (continued and method.step_draw == "sample" and 0 < rows < samples):
        return
    why = "a network that is called for each sample" if row_by_row else f"model.forward_chunk = {rows}"
    cure = "" if row_by_row else f", or model.forward_chunk={samples} or 0"
    raise ValueError(
        f"loop.sharding = {cfg.loop.sharding} with method.step_draw = sample and {why}: the ranks, with {samples} samples "
        "each, would call the sharded student unequally often and wait for each other forever; set "
        f"method.step_draw=batch{cure}"
    )


def check_mixture(cfg: RunConfig, ranks: int) -> None:
    """ValueError if several ranks shard a fake score that is mixed with the teacher, weight by weight."""
    whole = not isinstance(cfg.model, DiffusersModel) or cfg.model.full in ("fake", "both")
    sharded = ranks > 1 and whole and cfg.loop.sharding != "none"
    if isinstance(cfg.method, DMDRConfig) and cfg.method.mixes and sharded:
        raise ValueError(
            f"loop.sharding = {cfg.loop.sharding}, and a sharded fake score cannot be mixed with the teacher "
            f"(method.overlap = {cfg.method.overlap:g}); set method.overlap=0 or loop.sharding=none"
        )


def _try_rewards(
    cfg: RunConfig, components: Components, validated: Sequence[str], validated_meta: Sequence[Mapping[str, Any]]
) -> None:
    """The rewards on a training prompt, the held-out scorers on a validation prompt; ``validated_meta``: of all of these."""
    device = next(iter(components.roles.parameters("student").values())).device
    if isinstance(cfg.model, DiffusersModel):
        sizes = [(model.height, model.width) for model in cfg.model.each_size]
    else:
        height, width = components.codec.decode(torch.zeros(1, *components.latent_shape, device=device)).shape[2:]
        sizes = [(height, width)]
    meta = components.stream.meta[0][0] if components.stream.meta else None
    validated_columns = frozenset(name for row in validated_meta for name in row)
    for size in sizes:
        if cfg.method.rewarded:
            first, columns = components.stream.groups[0][0], components.stream.columns
            try_rewards(components.rewards, size, first, meta, str(device), columns)
        for text in validated:
            row = next(iter(validated_meta), None)
            try_rewards(components.scorers, size, text, row, str(device), validated_columns)


def encode(encoder: CachedText, texts: Sequence[str], console: Console = QUIET) -> None:
    """Encode the prompts that the cache lacks, with their number and, on a terminal, a bar."""
    missing = len(encoder.missing(texts))
    if missing:
        console.print(
            f"encoding {counted(missing, 'prompt')} once into {encoder.folder}", markup=False, highlight=False
        )
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn())
    with (
        writing("the text embeddings", encoder.folder, SHARDS_STAY, "model.embeddings"),
        Progress(*columns, console=console, disable=not (missing and console.is_terminal), transient=True) as progress,
    ):
        bar = progress.add_task("prompts", total=missing)
        encoder.prepare(texts, lambda done: progress.advance(bar, done))


def check_places(cfg: RunConfig, settings: TrainSettings = DEFAULTS) -> None:
    """ValueError for a base model, student, tiny decoder or LoRA that is neither on this machine nor a hub id."""
    if not isinstance(cfg.model, DiffusersModel) or settings.given.pipeline is not None:
        return
    from gdmd.models.loading import is_local
    from gdmd.models.lora_location import local_file

    model = cfg.model
    starts = (lambda: is_local(model.start.location, model.start.field),) if model.student else ()
    loras = (*model.teacher_loras, *((model.student_lora,) if model.student_lora else ()))
    files = (partial(local_file, lora.path) for lora in loras)
    tiny = model.scoring_decoder
    decoders = (lambda: is_local(tiny, "model.scoring_decoder", "config.json"),) if tiny is not None else ()
    all_errors(lambda: is_local(model.location, model.field), *starts, *files, *decoders)


def check_prompts(cfg: RunConfig, settings: TrainSettings = DEFAULTS) -> None:
    """Report what the reader of the prompts skipped. ValueError: no prompts, or one outside Shapes' grammar."""
    found, where = settings.given.prompts, "train_dataset"
    if found is None:
        require_prompts(cfg)
        if cfg.prompts.file is None:
            return
        found, where = read_prompts(cfg.prompts.file, cfg.prompts.column), f"prompt file {cfg.prompts.file}"
    if note := found.note():
        settings.say(note)
    if not cfg.shapes_world:
        return
    table = catalog()
    for prompt in found.prompts:
        for text in dict.fromkeys((prompt.text, teacher_prompt(prompt.meta or {}, prompt.text))):
            try:
                table.row(text)
            except ValueError as error:
                raise ValueError(f"{where}, {prompt.where}: {error}") from error


def run_training(cfg: RunConfig, run: Run, components: Components, settings: TrainSettings = DEFAULTS) -> TrainOutput:
    """Train ``run`` to its last step, from its newest checkpoint; then evaluate and report unless it was interrupted.

    An open pipeline that was given as the base model generates its own images again afterwards: no adapter is active.
    """
    try:
        return _train_and_report(cfg, run, components, settings)
    finally:
        if settings.given.pipeline is not None:
            cast("DiffusersRoles", components.roles).teacher.net.ready()


def _train_and_report(cfg: RunConfig, run: Run, components: Components, settings: TrainSettings) -> TrainOutput:
    context, console = settings.context, settings.console
    settings.say(f"{cfg.name}: {cfg.about}" if cfg.about else cfg.name)
    settings.say(f"{student(cfg)}; {length(cfg)}")
    for message in too_short(cfg):
        settings.say(f"warning: {message}")
    settings.say(f"run folder {run.path}")
    with phase("checking the inputs and the decoder", console, plain=False):
        # also after a resume: hub ids are resolved by now
        context.on_main(lambda: check_inputs(cfg, run, console, accept=settings.accept, given=settings.given))
        context.on_main(lambda: note_start(cfg, run.path))
        model = cfg.model
        if isinstance(model, DiffusersModel) and settings.given.pipeline is None:
            context.on_main(lambda: record_commits(model, run, console))
        context.on_main(lambda: check_decoder(cfg, components, run.path, console, settings.given))
    began = time.perf_counter()
    end = _train(cfg, run, components, settings)
    trained = TrainOutput(run.path, end, cfg.loop.steps, time.perf_counter() - began, components=components)
    if end.signal is not None or not settings.evaluation or not context.is_main:
        return trained
    for hint in _hints(cfg, typed(run.path)):
        settings.say(hint)
    if not cfg.shapes_world:
        with phase("writing the report", console):
            return replace(trained, report=report_run(run.path))
    whole = components
    if context.size > 1:  # the other ranks have exited, and with them their shards
        whole = build(cfg, settings.device, settings.given)
    row, report = finish_run(cfg, run.path, whole, end.step)  # shows its own progress
    return replace(trained, evaluation=row, report=report)


def _hints(cfg: RunConfig, run: str) -> list[str]:
    """The next steps after a training."""
    in_memory = isinstance(cfg.model, DiffusersModel) and cfg.model.path.startswith(PYTHON)
    hints = [SAVE] if in_memory else []
    if not cfg.shapes_world:
        hints.append(SCORE.format(source=f"{run},base=FOLDER" if in_memory else run))
    if isinstance(cfg.model, DiffusersModel):
        hints.append(EXPORT.format(run=run, base=" --base FOLDER" if in_memory else ""))
    return hints


def _train(cfg: RunConfig, run: Run, components: Components, settings: TrainSettings) -> TrainEnd:
    """The loop, with its progress display and validation."""
    context = settings.context
    scorer = getattr(components.method, "scorer", None)  # of the methods that read rewards

    def stats() -> Mapping[str, Any]:
        return {**reward_stats(components.rewards), **(scorer.stats() if scorer else {})}

    texts = [text for group in components.stream.groups for text in group]
    steps = components.student_steps or cfg.method.student_steps
    moved: Callable[[], Mapping[str, float]] = dict  # measures nothing
    if cfg.starts_as_teacher:
        moved = displacement_hook(components, texts, steps, cfg.loop, context.size, cfg.method.student_sampler)
    gains = gains_hook(components.method)

    def at_log() -> Mapping[str, float]:
        with without_stats(components.rewards):
            return {**moved(), **gains()}

    callbacks = tuple(settings.callbacks)
    with progress_for(cfg.loop.steps, settings.console) as progress:
        shown = progress if context.is_main else NoProgress()
        if repo := cfg.loop.push_checkpoints:
            callbacks += (HubCheckpoints(lambda saved: push_checkpoint(saved, repo), shown.note),)
        hooks = Hooks(
            shown,
            Validation(cfg, components, context, shown) if cfg.validation.every else None,
            cfg.validation.every,
            stats=stats,
            at_log=at_log,
            reason=lambda name: reason_unscored(components.rewards, name),
            resume_advice=settings.given.resume_advice,
            callbacks=callbacks,
        )
        return train(components.method, components.roles, components.stream, cfg.loop, run, hooks, context)
