"""Which rewards a run's student has seen: those of the run, and those of the runs that it started from (loop.start_from)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdmd.config.describe import trained_rewards
from gdmd.config.run import RunConfig
from gdmd.runs.run_folder import TRAINED_BEFORE, open_run, read_facts, write_facts
from gdmd.runs.student_file import read_student_file, student_file


def trained_on(cfg: RunConfig, run: Path) -> tuple[str, ...]:
    """Labels of all rewards that trained the student of a run, its own first."""
    return tuple(dict.fromkeys((*trained_rewards(cfg), *trained_before(cfg, run))))


def trained_before(cfg: RunConfig, run: Path) -> tuple[str, ...]:
    """Labels of the rewards of the runs before a run.

    A run of an earlier version did not record them: they are read from its loop.start_from, if that is still there.
    """
    facts = read_facts(run) if (run / "run.json").is_file() else {}
    if TRAINED_BEFORE in facts or not cfg.loop.start_from:
        return tuple(facts.get(TRAINED_BEFORE, ()))
    try:
        return rewards_of_start(cfg.loop.start_from)
    except ValueError:
        return ()


def note_start(run: Path, start_from: str) -> None:
    """Record in run.json the rewards that trained the student of ``start_from``."""
    write_facts(run, read_facts(run) | {TRAINED_BEFORE: list(rewards_of_start(start_from))})


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
