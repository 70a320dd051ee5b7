"""``gdmd export``: write the student of a run as a LoRA or a pipeline for diffusers, with a model card."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gdmd.config.describe import trained_rewards
from gdmd.config.model import DiffusersModel, LoraFile
from gdmd.config.run import RunConfig
from gdmd.diffusion.device import DTYPES
from gdmd.export.card import model_card
from gdmd.export.front_matter import base_license
from gdmd.export.lora import check_fits, save_lora
from gdmd.export.pipeline import call_arguments, left_out, save_merged, student_scheduler
from gdmd.io import RunError, read_json, typed, write_atomic, writing
from gdmd.models.families.base import Family
from gdmd.models.loading import open_family
from gdmd.models.lora_files import check_stock_loading
from gdmd.models.lora_location import DIFFUSERS_FILE
from gdmd.programs.decoder_check import read_gaps
from gdmd.recipes.contents import checkpoint_content, pipeline_content
from gdmd.recipes.inputs import on_base
from gdmd.recipes.run_folders import config_of
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import TRAINED_BEFORE, read_facts, read_metrics
from gdmd.runs.student_file import EXPORT_FILE
from gdmd.runs.trained_on import trained_before, trained_on

_log = logging.getLogger(__name__)


def export_run(
    run: Path,
    folder: Path | None = None,
    *,
    merged: bool = False,
    averaged: bool = True,
    which: str = "last",
    base: str | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
    loras: bool = True,
    license: str | None = None,
    repo_id: str | None = None,
) -> list[Path]:
    """Write the student of ``run`` (its EMA, unless ``averaged`` is false) and return the written files.

    ``which``: the checkpoint: best, last or a step; a sharded one is joined. ``base``: the new location of the base
    model, or with model.student of that. ``dtype``: of a merged pipeline; default: the run's. ``loras``: the exported
    LoRA contains the run's own (model.teacher_loras, model.student_lora), so that it is for the published pipeline;
    else ValueError for one that diffusers alone does not load.
    ``license``: default: that of the base model's card. ``repo_id``: the hub id from which the card's code loads the
    student.

    Default folder: RUN/export or RUN/export-merged. ``merged`` writes the whole pipeline, which a full student always
    needs; else the LoRA and the scheduler are written. ValueError for a run of the Shapes world and for a base of
    another model, RunError for a run without a checkpoint.
    """
    cfg, step, weights = read_student(run, which, base, "--base", averaged=averaged)
    model = real_model(cfg, run).start  # all that the student needs
    whole = merged or model.full in ("student", "both")
    _check_options(dtype, loras=loras, whole=whole)
    given, separate = (model.teacher_loras, ()) if loras else ((), model.teacher_loras)
    target = folder or run / ("export-merged" if whole else "export")
    _check_kind(target, whole=whole)
    original = model.model_copy(update={"quantization": "none"})  # the student is merged into the base's own weights
    family = open_family(original, extras=whole)
    check_fits(family, weights)
    for one in separate:
        check_stock_loading(family.pipe, one)
    arguments = call_arguments(family, cfg.method.student_steps)
    measured = averaged or not cfg.loop.ema  # samples and scores of a run are those of its EMA weights
    facts = read_facts(run) | {"step": step, "scoring": read_gaps(run), TRAINED_BEFORE: trained_before(cfg, run)}
    facts |= {"validation": validation_at(run, step) if measured else {}, "last_weights": not measured}
    content = describe(cfg, family, arguments, step, merged=whole)
    content |= {"rewards": list(trained_on(cfg, run))}
    content |= {"loras": [one.model_dump() | {"path": _absolute(one.path)} for one in separate]} if separate else {}
    with writing("the export", target, option="--out"):
        target.mkdir(parents=True, exist_ok=True)
        _clear(target)
        if whole:
            files, rounding = _write_pipeline(cfg, family, weights, target, dtype)
            content |= rounding
        else:
            files = _write_lora(cfg, family, weights, target, given)
        samples, card = _copy_samples(run, step if measured else 0, target), target / "README.md"
        found: dict[str, Any] = {
            "measured": measured_at(run, step) if measured else None,
            "license": _license(model, license),
            "samples": samples,
            "dtype": content["dtype"],
        }
        where = repo_id or "THIS_FOLDER"
        text = model_card(cfg, family, arguments, facts, merged=whole, where=where, separate=separate, **found)
        card.write_text(text, encoding="utf-8")
    described = target / EXPORT_FILE
    write_atomic(described, json.dumps(content, indent=2) + "\n", "the export")
    return [*files, *([target / samples] if samples else []), described, card]


def _check_options(dtype: str | None, *, loras: bool, whole: bool) -> None:
    """ValueError for an option without effect on a LoRA, or on a ``whole`` pipeline."""
    if dtype is not None and not whole:
        raise ValueError(
            "--dtype applies to a merged pipeline only, a LoRA is always fp32; add --merged or omit --dtype"
        )
    if whole and not loras:
        raise ValueError("--no-loras applies to a LoRA only: a merged pipeline contains the run's LoRAs; leave it out")


def _check_kind(target: Path, *, whole: bool) -> None:
    """ValueError for a file, and for a folder with an export of the other kind, whose files would stay next to the new ones.

    The description of an interrupted export is missing: its files tell the kind.
    """
    if target.is_file():
        raise ValueError(f"{target} is a file, not a folder; choose another folder with --out")
    merged = whole
    if (target / EXPORT_FILE).is_file():
        merged = read_json(target / EXPORT_FILE, "Choose another folder, or delete that one.").get("merged", whole)
    elif (target / (DIFFUSERS_FILE if whole else "model_index.json")).is_file():
        merged = not whole
    if merged != whole:
        kinds = ("a LoRA", "a merged pipeline")
        raise ValueError(
            f"{target} holds {kinds[merged]}, and this export is {kinds[whole]}; choose another folder (--out), or delete "
            "that one"
        )


def _write_pipeline(
    cfg: RunConfig, family: Family, weights: Mapping[str, Tensor], target: Path, dtype: str | None
) -> tuple[list[Path], dict[str, Any]]:
    """Write the merged pipeline: its folder, and its precision with the share of changes that rounding undid."""
    method = cfg.method
    rounded = DTYPES[dtype] if dtype else None
    undone = save_merged(family, weights, method.student_steps, target, rounded, method.student_sampler)
    dtype = dtype or family.cfg.dtype
    if undone:
        _log.warning(
            "rounding to %s loses the change of %.1f %% of the weights that the student changed; the LoRA and a merged "
            "pipeline in fp32 (--dtype fp32) keep it",
            *(dtype, 100 * undone),
        )
    return [target], {"dtype": dtype, "undone_by_rounding": undone}


def _write_lora(
    cfg: RunConfig, family: Family, weights: Mapping[str, Tensor], target: Path, contained: Sequence[LoraFile]
) -> list[Path]:
    """Write the LoRA, including the run's LoRAs in ``contained``, and the scheduler."""
    scheduler = student_scheduler(family, cfg.method.student_steps, cfg.method.student_sampler)
    files = save_lora(family, weights, target, contained)
    scheduler.save_pretrained(target / "scheduler")
    return [*files, target / "scheduler"]


def read_student(
    run: Path, which: str, base: str | None, option: str, *, averaged: bool = True
) -> tuple[RunConfig, int, Mapping[str, Tensor]]:
    """The configuration of a run of a real model with its base where it is now, and the step and weights of its student.

    ``base``: the new location of the student's base: of model.student, if the run has one, else of model.path.
    ``option``: how the caller names it, for errors.
    """
    moved: Literal["path", "student"] = "path" if real_model(config_of(run), run).student is None else "student"
    return on_base(config_of(run), run, base, option, moved), *student_weights(run, which, averaged=averaged)


def student_weights(run: Path, which: str, *, averaged: bool = True) -> tuple[int, Mapping[str, Tensor]]:
    """The step of a checkpoint and the weights of its student: their EMA, if ``averaged`` and there is one."""
    saved = checkpoint.load_chosen(run / "checkpoints", which)
    if saved is None:
        raise RunError(f"{run} has no checkpoint yet. Train it first: gdmd train --resume {typed(run)}.")
    return saved.step, (saved.part("ema") if averaged else {}) or saved.part("student")


def _license(model: DiffusersModel, given: str | None) -> dict[str, str]:
    found = {"license": given} if given else base_license(model)
    if not found:
        _log.warning("the license of %s is not known, so the model card has none; set it with --license", model.path)
    return found


def _clear(target: Path) -> None:
    """Remove the description and sample images of an earlier export: they do not belong to the files that follow.

    The new description is written last, so that a folder of an interrupted export is not taken for an export.
    """
    if (target / EXPORT_FILE).is_file():
        for old in (target / "images").glob("step_*.png"):
            old.unlink()
        (target / EXPORT_FILE).unlink()


def _copy_samples(run: Path, step: int, target: Path) -> str | None:
    """Copy the run's newest sample images up to this step; their path in ``target``."""
    grids = sorted(file for file in (run / "grids").glob("step_*.png") if file.stem[5:].isdigit())
    drawn = [file for file in grids if 0 < int(file.stem[5:]) <= step]
    if not drawn:
        return None
    (target / "images").mkdir(exist_ok=True)
    shutil.copyfile(drawn[-1], target / "images" / drawn[-1].name)
    return f"images/{drawn[-1].name}"


def validation_at(run: Path, step: int) -> dict[str, tuple[float, float | None]]:
    """Scorer -> means of the student at this step and of the teacher on the run's validation prompts, where logged."""
    rows = [row for row in read_metrics(run) if row["step"] <= step]  # later ones may be of other prompts
    prefix, teacher = "validation/", "validation/teacher/"
    student = {
        key: value for row in rows if row["step"] == step for key, value in row.items() if key.startswith(prefix)
    }
    teachers = {
        key: value for row in rows for key, value in row.items() if key.startswith(teacher) and math.isfinite(value)
    }
    scores = {key.removeprefix(prefix): value for key, value in student.items() if not key.startswith(teacher)}
    return {name: (value, teachers.get(f"{teacher}{name}")) for name, value in scores.items() if math.isfinite(value)}


def describe(
    cfg: RunConfig, family: Family, arguments: Mapping[str, Any], step: int, *, merged: bool
) -> dict[str, Any]:
    """gdmd_export.json: what gdmd needs to sample from the export."""
    model = family.cfg
    return {
        "base": _absolute(model.path),
        "shapes": cfg.shapes_world,
        "base_content": pipeline_content(model),
        "revision": model.revision,
        "variant": model.variant,
        "without": left_out(family),
        "dtype": model.dtype,
        "merged": merged,
        "pipeline": family.pipeline,
        "scheduler": family.student_scheduler(cfg.method.student_sampler),
        "arguments": dict(arguments),
        "rewards": list(trained_rewards(cfg)),
        "step": step,
    }


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def measured_at(run: Path, step: int) -> dict[str, Any] | None:
    """RUN/preference/preference.json if it was measured with this step's weights at the export's size, else None."""
    file = run / "preference" / "preference.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kept = ("prompts", "prompt_file", "images_per_prompt", "seed", "scores")
        rows = [{key: row[key] for key in ("mean", "low", "high", "trained")} for row in found["scores"].values()]
        measured = {key: found[key] for key in kept} | {"scores": dict(zip(found["scores"], rows, strict=True))}
        mine = found["source"]["step"] == step and found.get("weights") == checkpoint_content(run, step)
        model = real_model(config_of(run), run)
        return measured if mine and found.get("size") in (None, [model.height, model.width]) else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{file} cannot be read ({error}); evaluate again, or delete it") from error


def real_model(cfg: RunConfig, run: Path) -> DiffusersModel:
    """The model of a run of a diffusers pipeline. ValueError for a run of the Shapes networks."""
    if not isinstance(cfg.model, DiffusersModel):
        raise ValueError(
            f"{run} is a run of the Shapes world, which diffusers cannot load; generate images with "
            f"`gdmd sample {typed(run)}`. Its student is in {run / 'checkpoints'} as safetensors"
        )
    return cfg.model
