"""benchmarks/checkpoints.py sees who waits for the disk: the loop, or the thread beside it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpoints
from gdmd.runs import checkpoint

SLOW = 0.3


def test_a_slow_disk_holds_the_loop_that_writes_and_not_the_one_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*given: Any) -> None:
        time.sleep(SLOW)
        commit(*given)

    commit = checkpoint._commit
    monkeypatch.setattr(checkpoint, "_commit", slow)
    monkeypatch.setattr(checkpoints, "ALONE_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    state = checkpoints.large_state(1)
    assert sum(tensor.nbytes for named in state.values() for tensor in named.values()) == 2**20
    row = checkpoints.measure(state, lambda: time.sleep(0.001), 1, tmp_path)
    assert row["sync_held_s"] >= SLOW > row["async_held_s"] and row["async_written_s"] >= SLOW
    assert row["held_ratio"] < 1 and row["mib"] == 1 and list(tmp_path.iterdir()) == []
    assert "1.0" in checkpoints.table({"small": row})
