"""Checkpoints written aside: the loop goes on, the copy does not change, errors come back, and one is at work at most."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gdmd.config.training import LoopConfig
from gdmd.io import RunError
from gdmd.runs import checkpoint
from gdmd.training.distributed import SINGLE
from gdmd.training.saver import Saver


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The writer of step 1 stands still until it is set."""
    gate, commit = threading.Event(), checkpoint.commit

    def slow(place: checkpoint.Place, *rest: object) -> Path:
        assert place.step != 1 or gate.wait(20)
        return commit(place, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "commit", slow)
    yield gate
    gate.set()


def saver(folder: Path, note: Callable[[str], None] = lambda said: None, **changes: object) -> Saver:
    return Saver(folder, LoopConfig(**{"keep_checkpoints": 0, "checkpoint_async": True} | changes), SINGLE, note)


def test_the_loop_goes_on_and_what_it_changes_meanwhile_is_not_in_the_checkpoint(
    tmp_path: Path, gate: threading.Event
) -> None:
    own, weights = saver(tmp_path), torch.zeros(3)
    own.save(1, {"student": {"w": weights}}, {"updates": 1})
    assert own.writing and own.newest is None and checkpoint.load_newest(tmp_path) is None
    assert own.stands() == "There is no checkpoint yet."
    weights += 1
    gate.set()
    own.settle()
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None and saved.part("student")["w"].tolist() == [0, 0, 0] and saved.state == {"updates": 1}
    assert own.newest == saved.path and not own.writing


def test_without_it_the_checkpoint_stands_when_save_returns(tmp_path: Path) -> None:
    own = saver(tmp_path, checkpoint_async=False)
    own.save(1, {"student": {"w": torch.zeros(3)}}, {})
    assert own.newest == tmp_path / "step_000001" and checkpoint.steps(tmp_path) == [1]


def test_the_next_save_waits_for_the_previous_one_and_says_so(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdmd.training.saver.LONG", 0.05)
    notes: list[str] = []
    own = saver(tmp_path, notes.append)
    own.save(1, {"student": {"w": torch.zeros(3)}}, {})
    threading.Timer(0.2, gate.set).start()
    own.save(2, {"student": {"w": torch.ones(3)}}, {})
    assert checkpoint.steps(tmp_path)[0] == 1
    own.settle()
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert len(notes) == 1 and "step 2 waited 0." in notes[0] and "loop.checkpoint_every" in notes[0]


@pytest.mark.parametrize("aside", [True, False])
def test_an_error_of_the_writer_is_raised_once_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aside: bool
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    own = saver(tmp_path, checkpoint_async=aside)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fsync", full)
        with pytest.raises(RunError, match=r"step_000001: No space left.*0 older checkpoint.*Free some disk space"):
            own.save(1, {"student": {"w": torch.zeros(3)}}, {})
            while own.writing:
                time.sleep(0.001)
            assert own.failed
            own.settle()
    assert list(tmp_path.iterdir()) == [] and own.newest is None
    own.save(2, {"student": {"w": torch.zeros(3)}}, {})
    own.settle()
    assert checkpoint.steps(tmp_path) == [2]


def test_an_error_that_nobody_has_heard_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(checkpoint, "_fsync", full)
    notes: list[str] = []
    own = saver(tmp_path, notes.append)
    own.save(1, {"student": {"w": torch.zeros(3)}}, {})
    own.close()
    assert len(notes) == 1 and "The file system is read-only" in notes[0]


def test_nothing_of_the_copy_is_kept_once_it_is_written(tmp_path: Path) -> None:
    own = saver(tmp_path)
    own.save(1, {"student": {"w": torch.zeros(3)}}, {})
    writer = own._writer
    assert writer is not None
    own.settle()
    assert writer._work is dict and not writer.is_alive()
