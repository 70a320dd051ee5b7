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


def test_failure_is_a_note() -> None:
    notes: list[str] = []

    def push(checkpoint: Path) -> None:
        if checkpoint.name == "step_1":
            raise ValueError("no network.")

    callback: Any = HubCheckpoints(push, notes.append)
    for step in (1, 2):
        callback.on_save(State(), Path(f"step_{step}"))
        callback.on_train_end(State())
    assert notes == ["step_1 was not uploaded: no network. It is tried again with the next checkpoint."]
