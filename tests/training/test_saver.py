"""Background checkpoints: the loop continues, the copy does not change, errors come back, one is written at a time."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from toy_training import full_disk, read_only_disk

from gdmd.config.training import LoopConfig
from gdmd.io import RunError
from gdmd.runs import checkpoint
from gdmd.training.distributed import SINGLE_PROCESS
from gdmd.training.saver import Saver

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The writer of step 1 waits until it is set."""
    gate, save = threading.Event(), checkpoint.save

    def slow(folder: Path, step: int, *rest: object) -> Path:
        assert step != 1 or gate.wait(20)
        return save(folder, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save", slow)
    yield gate
    gate.set()


def saver(folder: Path, note: Callable[[str], None] = lambda message: None, **changes: object) -> Saver:
    cfg = LoopConfig(**{"keep_checkpoints": 0, "checkpoint_async": True} | changes)
    return Saver(folder, cfg, SINGLE_PROCESS, note)


def test_loop_continues_while_writing(tmp_path: Path, gate: threading.Event) -> None:
    """What the loop changes meanwhile is not in the checkpoint."""
    own, weights = saver(tmp_path), torch.zeros(3)
    own.save(1, {"student": {"w": weights}}, {"updates": 1})
    writer = own._writer
    assert own.writing and own.newest is None and checkpoint.load_newest(tmp_path) is None
    assert own.last_checkpoint() == "There is no checkpoint yet."
    weights += 1
    gate.set()
    own.wait()
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None and saved.part("student")["w"].tolist() == [0, 0, 0] and saved.state == {"updates": 1}
    assert own.newest == saved.path and not own.writing
    assert writer is not None and writer._write is None and not writer.is_alive()  # the copy is freed


def test_synchronous_save_is_complete_when_it_returns(tmp_path: Path) -> None:
    own = saver(tmp_path, checkpoint_async=False)
    own.save(1, {"student": {"w": torch.zeros(3)}}, {})
    assert own.newest == tmp_path / "step_000001" and checkpoint.steps(tmp_path) == [1]


def test_next_save_waits_and_reports_it(tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdmd.training.saver.SLOW_SAVE_SECONDS", 0.05)
    notes: list[str] = []
    own = saver(tmp_path, notes.append)
    own.save(1, {"student": {"w": torch.zeros(3)}}, {})
    threading.Timer(0.2, gate.set).start()
    own.save(2, {"student": {"w": torch.ones(3)}}, {})
    assert checkpoint.steps(tmp_path)[0] == 1
    own.wait()
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert len(notes) == 1 and re.search(r"step 2 waited \d+\.\d", notes[0]) and "loop.checkpoint_every" in notes[0]


@pytest.mark.parametrize("background", [True, False])
def test_writer_error_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    own = saver(tmp_path, checkpoint_async=background)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fsync", full_disk)
        with pytest.raises(RunError, match=r"step_000001: No space left.*there is no older one.*Free some disk space"):
            own.save(1, {"student": {"w": torch.zeros(3)}}, {})
            while own.writing:
                time.sleep(0.001)
            assert own.failed
            own.wait()
    assert list(tmp_path.iterdir()) == [] and own.newest is None
    own.save(2, {"student": {"w": torch.zeros(3)}}, {})
    own.wait()
    assert checkpoint.steps(tmp_path) == [2]


def test_close_reports_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_fsync", read_only_disk)
    notes: list[str] = []
    own = saver(tmp_path, notes.append)
    own.save(1, {"student": {"w": torch.zeros(3)}}, {})
    own.close()
    assert len(notes) == 1 and "The file system is read-only" in notes[0]
