"""Where a run goes and what is in a run folder; without torch, so that a refused folder is reported at once."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gdmd.config.load import load_config
from gdmd.config.methods.baseline import BaselineConfig
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.config.shapes_pipeline import draws_real_images
from gdmd.io import RunError, near_name, typed, write_atomic, writing
from gdmd.recipes.read import read_recipe
from gdmd.runs.run_folder import Run, check_same_config, differing, open_run

MAY_CHANGE = (
    *("loop.steps", "loop.checkpoint_every", "loop.keep_checkpoints", "loop.log_every"),
    *("validation.prompts", "validation.every", "validation.images", "validation.scorers"),
    *("loop.report_to", "loop.push_checkpoints"),
    *("loop.sharding", "loop.rank_timeout", "loop.checkpoint_async", "model.offload"),
    *("loop.best_metric", "loop.best_direction", "loop.on_nonfinite", "loop.skip_limit"),
    "model.lora_targets",
)
"""What a resumed run may change: how long it trains, what it writes and on what it runs, and what it does about numbers
that are not finite, which stopped it; never what it computes from finite ones. Other adapters than the checkpoint's are
refused when it is loaded, so lora_targets can only name the same layers: the defaults of the version that began the run."""
MOVABLE = (
    *("model.path", "model.teacher", "model.vae", "model.scoring_decoder", "prompts.file"),
    *("model.student", "model.student_lora.path"),
    *("real_data.latents", "real_data.source"),
)
"""Locations that may change if the content is the same: ``recipes.inputs`` checks it (real images by their latents)."""
WEIGHTS = ("path", "clip", "tokenizer", "detector", "asset")
"""Locations of a reward's weights: likewise."""
TARGETS = ("target", "reader")
"""Functions of a reward, as module or file and name: likewise, by their code."""
SERVER = ("url", "token_variable", "timeout_s", "retries", "batch", "on_failure", "max_unscored")
"""Fields of a remote reward that may change, too: where its server is, and how long to wait for it."""
DIFFERENTIABLE = "differentiable"
"""This field of a reward function may change: it decides whether a method may read the gradient, not which numbers it gets.
Earlier versions stored false for a function whose attribute says true."""
TEACHERS = ("teacher", "teacher-4", "teacher-4-plain")
"""What can be evaluated and sampled besides a run folder."""


SECOND_STAGE = (
    *("loop.start_from=shapes:dmd", "loop.steps=140", "loop.checkpoint_every=20"),
    *("validation.every=14", "eval.per_task=150", "eval.images=2"),
)
"""What ``gdmd demo`` changes in the recipe shapes_gdmd, to end in five minutes on two cores."""


def demo_recipe(recipe: str | None, overrides: Sequence[str] = (), *, from_scratch: bool = False) -> RunConfig:
    """The recipe of the demo's GDMD row: by default shapes_gdmd from the shipped DMD student. ValueError for both."""
    if recipe and from_scratch:
        raise ValueError(
            f"--from-scratch is the recipe shapes_demo, and --recipe {recipe} was given too; leave one out"
        )
    if recipe or from_scratch:
        return read_recipe(recipe or "shapes_demo", overrides)
    return read_recipe("shapes_gdmd", (*SECOND_STAGE, *overrides))


def new_folder(cfg: RunConfig) -> Path:
    """runs/RECIPE-seedN, or with the time of day in its name where that one is taken."""
    first = Path("runs") / f"{cfg.name}-seed{cfg.loop.seed}"
    return first if not first.exists() else first.with_name(f"{first.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def demo_folder(cfg: RunConfig) -> Path:
    """runs/demo while that one is new or unfinished; a finished demo, or one of other settings, is left alone."""
    first = Path("runs") / "demo"
    settings = first / "gdmd" / "config.yaml"
    other = settings.exists() and open_run(settings.parent).config != cfg.model_dump(mode="json")
    if other or (first / "report.html").exists():
        return first.with_name(f"demo-{time.strftime('%Y%m%d-%H%M%S')}")
    return first


def config_of(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run folder. RunError for another folder, ConfigError for a damaged config.yaml."""
    open_run(folder)
    return load_config(RunConfig, Path(folder) / "config.yaml", overrides)


def check_resumable(folder: Path, recipe: str | RunConfig | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration with which a run would be continued; a RunError names the keys that may not differ.

    A field that the run's version of gdmd did not have counts as its default. A RunError, too, for a baseline started before
    ``method.fake_samples``: it would continue as another algorithm.
    """
    before = config_of(folder)
    if isinstance(before.method, BaselineConfig) and "fake_samples" not in open_run(folder).config["method"]:
        raise RunError(
            f"{folder} was started with an earlier version of gdmd, which trained {before.method.kind} differently "
            "(docs/LOG.md, entry 41), so it cannot be resumed. Start a new run from its student: "
            f"gdmd train RECIPE {typed(f'loop.start_from={folder}')}"
        )
    if isinstance(recipe, RunConfig):
        cfg = recipe
    else:
        cfg = read_recipe(recipe, overrides) if recipe else config_of(folder, overrides)
    old, new = (_without_places(one.model_dump(mode="json")) for one in (before, cfg))
    extra = f"leave out the recipe {recipe} and these keys" if isinstance(recipe, str) else "leave these keys out"
    advice = (
        f"A resumed run keeps its configuration: {extra}. To change it, start a new run from "
        f"this one's student: gdmd train RECIPE KEY=VALUE {typed(f'loop.start_from={folder}')}"
    )
    check_same_config(Run(Path(folder), old), new, (*MAY_CHANGE, *MOVABLE), advice)
    _check_length(Path(folder), before.loop.steps, cfg.loop.steps)
    return cfg


def _check_length(folder: Path, before: int, now: int) -> None:
    """RunError for fewer steps than the run's newest checkpoint has."""
    done = _steps_done(folder)
    if now < min(before, done):
        raise RunError(
            f"loop.steps={now}: {folder} has already trained for {done} steps. Give more steps to train longer, or leave "
            "loop.steps out."
        )


def _steps_done(folder: Path) -> int:
    """The step of the newest checkpoint of a run; 0 without one."""
    names = (one.name[5:] for one in (folder / "checkpoints").glob("step_*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain data whose rewards (also those of a composite) and LoRAs do not say where they are."""
    model = {**config["model"]}
    model |= {"teacher_loras": _without_place(model["teacher_loras"])} if "teacher_loras" in model else {}
    return {**config, "model": model, "rewards": _without_place(config["rewards"])}


def _without_place(part: Any) -> Any:
    if isinstance(part, list):
        return [_without_place(one) for one in part]
    if not isinstance(part, dict):
        return part
    hidden = SERVER if part.get("kind") == "remote" else (*WEIGHTS, *TARGETS, "source", DIFFERENTIABLE)
    return {key: _without_place(value) for key, value in part.items() if key not in hidden}


def resumed(folder: Path, recipe: str | RunConfig | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, Run]:
    """The run to continue and its configuration, which is written down where it has changed."""
    cfg, run = check_resumable(folder, recipe, overrides), open_run(folder)
    config = cfg.model_dump(mode="json")
    if config != run.config:
        run.note_changes(_steps_done(folder), differing(run.config, config))
        text = yaml.safe_dump(config, sort_keys=False)
        write_atomic(run.path / "config.yaml", text, "the configuration")
    return cfg, Run(run.path, config)


def check_target(what: str, which: str = "last") -> None:
    """What ``gdmd eval RUN`` can measure: a row of the teacher, or a run on the Shapes world, which alone has checkpoints.

    RunError for another folder, ValueError for a run of a real model.
    """
    if what not in TEACHERS and not os.path.exists(what):
        raise RunError(f"{what} is not a run folder: it does not exist.{near_name(what, TEACHERS)}")
    if what not in TEACHERS:
        require_shapes(config_of(Path(what)), what)
    elif which != "last":
        raise RunError(f"--checkpoint {which}: {what} has no checkpoints; leave it out, or name a run folder.")


def require_shapes(cfg: RunConfig, run: str) -> None:
    """ValueError for the run of a real model, whose images ShapesEval cannot judge, and for a missing base model."""
    if cfg.shapes_world or not isinstance(cfg.model, DiffusersModel):
        return
    if not draws_real_images(cfg.model.path):
        raise ValueError(
            f"{run}: there is no folder {cfg.model.path}, its base model; if it has moved, record its new location "
            f"with: gdmd train --resume {typed(run)} model.path=FOLDER"
        )
    raise ValueError(
        f"{run} was not trained on Shapes captions (its model is {cfg.model.path}), but gdmd eval RUN measures ShapesEval, "
        "which finds the colored shapes of the Shapes world only. Score the run with: "
        f"gdmd eval preference {typed(run)} --prompts FILE --scorer clip"
    )


def check_png(path: Path) -> None:
    """ValueError for a file name that does not end in .png, RunError for a location that cannot be written."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path}: images are written as PNG; give a name that ends in .png")
    with writing("the images", path, option="--out"):
        if path.is_dir():
            raise RunError(f"--out {path} is a folder; give the name of a file in it, such as {path / 'samples.png'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise PermissionError(13, "Permission denied")
