"""What ``gdmd export`` does: the student of a run as a LoRA or a pipeline for diffusers, with a model card."""

from __future__ import annotations

from pathlib import Path

from gdmd.backbones.pipelines import open_family
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.export.card import model_card
from gdmd.export.lora import save_lora
from gdmd.export.pipeline import call_arguments, save_merged, student_scheduler
from gdmd.programs.folders import config_of
from gdmd.runs import checkpoint
from gdmd.runs.errors import RunError, writing
from gdmd.runs.rundir import read_facts


def export_run(run: Path, folder: Path | None = None, *, merged: bool = False, averaged: bool = True) -> list[Path]:
    """Write the newest student of ``run`` (its EMA, unless ``averaged`` is false) and return what was written.

    Default folder: RUN/export. ``merged`` writes the whole pipeline, as a full student always is; else the LoRA and
    the scheduler. ValueError for a run of the Shapes lab, RunError for one without a checkpoint.
    """
    cfg = config_of(run)
    model = _real(cfg, run)
    saved = checkpoint.load_newest(run / "checkpoints")
    if saved is None:
        raise RunError(f"{run} has no checkpoint yet. Train it first: gdmd train --resume {run}.")
    weights = (saved.part("ema") if averaged else {}) or saved.part("student")
    whole = merged or model.full in ("student", "both")
    target = folder or run / ("export-merged" if whole else "export")
    family, uniform = open_family(model), cfg.method.student_steps
    arguments = call_arguments(family, uniform)
    facts = read_facts(run) | {"step": saved.step}
    with writing("the export", target):
        target.mkdir(parents=True, exist_ok=True)
        if whole:
            files = [save_merged(family, weights, uniform, target)]
        else:
            files = save_lora(family, weights, target)
            student_scheduler(family, uniform).save_pretrained(target / "scheduler")
            files.append(target / "scheduler")
        card = target / "README.md"
        card.write_text(model_card(cfg, family, arguments, facts, merged=whole), encoding="utf-8")
    return [*files, card]


def _real(cfg: RunConfig, run: Path) -> DiffusersModel:
    if not isinstance(cfg.model, DiffusersModel):
        raise ValueError(
            f"{run} is a run of the Shapes lab, which diffusers cannot load; its student is in {run / 'checkpoints'} "
            "as safetensors"
        )
    return cfg.model
