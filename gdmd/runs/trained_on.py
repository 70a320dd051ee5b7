"""Which rewards a run's student has seen: those of the run, and those of the runs and exports that it started from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdmd.config.describe import trained_rewards
from gdmd.config.model import DiffusersModel
from gdmd.config.run import RunConfig
from gdmd.io import RunError, read_json
from gdmd.runs.checkpoint import steps
from gdmd.runs.run_folder import TRAINED_BEFORE, open_run, read_facts, write_facts
from gdmd.runs.student_file import EXPORT_FILE, read_student_file, student_file


def trained_on(cfg: RunConfig, run: Path) -> tuple[str, ...]:
    """Labels of all rewards that trained the student of a run, its own first."""
    return tuple(dict.fromkeys((*trained_rewards(cfg), *trained_before(cfg, run))))


def trained_before(cfg: RunConfig, run: Path) -> tuple[str, ...]:
    """Labels of the rewards that trained the student before a run.

    A run of an earlier version did not record them: they are read from its start, if that is still there.
    """
    facts = read_facts(run) if (run / "run.json").is_file() else {}
    if TRAINED_BEFORE in facts:
        return tuple(facts[TRAINED_BEFORE])
    try:
        return _rewards_before(cfg)
    except (ValueError, RunError):
        return ()


def note_start(cfg: RunConfig, run: Path) -> None:
    """Record in run.json the rewards that trained the student which the run starts from.

    Once the run has a checkpoint, the record stays: its student no longer comes from what is at the start now.
    """
    facts = read_facts(run)
    if TRAINED_BEFORE in facts and steps(run / "checkpoints"):
        return
    found = _rewards_before(cfg)
    if found or cfg.loop.start_from or TRAINED_BEFORE in facts:
        write_facts(run, facts | {TRAINED_BEFORE: list(found)})


def _rewards_before(cfg: RunConfig) -> tuple[str, ...]:
    started = rewards_of_start(cfg.loop.start_from) if cfg.loop.start_from else ()
    return tuple(dict.fromkeys((*started, *_rewards_of_exports(cfg))))


def _rewards_of_exports(cfg: RunConfig) -> tuple[str, ...]:
    """Labels of the rewards of the exports on this disk that are the student's base model or LoRAs."""
    if not isinstance(cfg.model, DiffusersModel):
        return ()
    base = cfg.model.start
    places = (Path(base.path), *(Path(lora.path) for lora in base.teacher_loras))
    files = ((place.parent if place.is_file() else place) / EXPORT_FILE for place in places)
    found = (read_json(file, "Export the run again.").get("rewards", ()) for file in files if file.is_file())
    return tuple(str(label) for labels in found for label in labels)


def rewards_of_start(start_from: str) -> tuple[str, ...]:
    """Labels of all rewards that trained the student of loop.start_from; none for a folder with only checkpoints."""
    folder = Path(start_from)
    if file := student_file(start_from):
        facts = read_student_file(file).metadata
        config: Mapping[str, Any] = facts["config"]
    elif (folder / "config.yaml").is_file():
        config, facts = open_run(folder).config, read_facts(folder) if (folder / "run.json").is_file() else {}
    else:
        return ()
    try:
        own = trained_rewards(RunConfig.model_validate(config))
    except ValueError:  # of another version of gdmd: no reward is taken for unseen
        own = tuple(str(reward.get("kind")) for reward in config.get("rewards", ()))
    return tuple(dict.fromkeys((*own, *facts.get(TRAINED_BEFORE, ()))))
