"""Checkpoints that are uploaded during training: the newest one, without stopping the training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from gdmd.training.hub_checkpoints import HubCheckpoints


@dataclass
class State:
    """What the callback reads."""

    is_main: bool = True


def test_newest_checkpoint_follows_the_one_in_progress() -> None:
    free, pushed = Event(), []

    def push(checkpoint: Path) -> None:
        free.wait(10)
        pushed.append(checkpoint.name)

    callback, state = HubCheckpoints(push, pytest.fail), State()
    on_save: Any = callback.on_save
    for step in (1, 2, 3):
        on_save(state, Path(f"step_{step}"))
    on_save(State(is_main=False), Path("another rank"))
    assert pushed == []
    free.set()
    callback.on_train_end(state)  # type: ignore[arg-type]
    assert pushed == ["step_1", "step_3"]


def test_failure_is_reported_and_the_last_checkpoint_is_tried_again() -> None:
    notes: list[str] = []
    failures = {"step_1": 2, "step_2": 1}  # that are left
    pushed: list[str] = []

    def push(checkpoint: Path) -> None:
        failures[checkpoint.name] -= 1
        if failures[checkpoint.name] >= 0:
            raise ValueError("no network.")
        pushed.append(checkpoint.name)

    callback: Any = HubCheckpoints(push, notes.append)
    for step in (1, 2):
        callback.on_save(State(), Path(f"run/checkpoints/step_{step}"))
        callback.on_train_end(State())
    instead = "The next checkpoint is uploaded instead, or this one at the end."
    assert notes == [
        f"step_1 was not uploaded: no network. {instead}",
        "step_1 was not uploaded: no network. It is in run/checkpoints only.",
        f"step_2 was not uploaded: no network. {instead}",
    ]
    assert pushed == ["step_2"]
