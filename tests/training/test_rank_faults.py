"""Two ranks when one gets a signal, hangs, is killed, sees bad numbers, fails, or cannot write."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ended, run_ranks
from torch import Tensor
from toy_training import Toy, ToyMethod, ToyRoles, ToyStream, full_disk, toy_config

from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run, read_metrics
from gdmd.training.callbacks import TrainerCallback, TrainerState
from gdmd.training.distributed import DistributedContext
from gdmd.training.loop import Hooks, train
from gdmd.training.trackers import TensorBoard

AT = 6
"""The step at which it happens; a checkpoint is saved every five steps."""


@pytest.fixture(scope="module", autouse=True)
def _loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports what training imports on first use before the ranks are forked: in each of them it would take seconds."""
    Toy(tmp_path_factory.mktemp("loaded") / "run", toy_config(1)).train()


def two(
    folder: Path,
    at_step: Callable[[int, int], None] = lambda rank, step: None,
    poison: Callable[[int, str, Tensor], Tensor] | None = None,
    callbacks: Callable[[int], list[TrainerCallback]] = lambda rank: [],
    **changes: Any,
) -> list[Ended]:
    """A toy run of 20 steps by two ranks; ``poison`` is for rank 1; ``callbacks(rank)``."""
    run = folder / "run"

    def work(context: DistributedContext) -> int:
        cfg = toy_config(20, **changes)
        context.on_main(lambda: None if run.exists() else create(run, {}).path.name)
        roles = ToyRoles()
        method = ToyMethod(roles, poison=poison if context.rank == 1 else None)
        stream = ToyStream(8, lambda step: at_step(context.rank, step))
        hooks = Hooks(callbacks=callbacks(context.rank))
        return train(method, roles, stream, cfg, open_run(run), hooks, context).exit_code

    return run_ranks(work, folder, seconds=120)


def steps(folder: Path) -> list[int]:
    return checkpoint.steps(folder / "run" / "checkpoints")


def codes(ended: list[Ended]) -> list[int]:
    return [end.code for end in ended]


def test_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    """All ranks stop after the same iteration with a checkpoint and the signal's code; the run resumes."""

    def at(rank: int, step: int) -> None:
        if (rank, step) == (1, AT):
            for _ in range(2):  # a scheduler and a launcher may both send it
                os.kill(os.getpid(), signal.SIGTERM)

    assert codes(two(tmp_path, at)) == [143, 143]
    assert steps(tmp_path) == [5, AT + 1]
    assert codes(two(tmp_path)) == [0, 0]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 21))


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_a_callback_on_one_rank_stops_all(tmp_path: Path, event: str) -> None:
    def callbacks(rank: int) -> list[TrainerCallback]:
        def stop(state: TrainerState, *_: Any) -> None:
            assert state.is_main == (rank == 0)
            state.should_stop = state.should_stop or (rank, state.step) == (1, AT)

        one = TrainerCallback()
        setattr(one, event, stop)
        return [one]

    assert codes(two(tmp_path, callbacks=callbacks)) == [0, 0]
    assert steps(tmp_path) == [5, AT]
    assert codes(two(tmp_path)) == [0, 0] and steps(tmp_path) == [15, 20]


def test_a_tracker_that_does_not_start_ends_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("not logged in")

    monkeypatch.setattr(TensorBoard, "open", refuse)
    ended = two(tmp_path)
    assert codes(ended) == [2, 2]
    assert "tensorboard did not start: PermissionError: not logged in" in ended[0].said and ended[1].said == ""


def test_nonfinite_loss_on_one_rank(tmp_path: Path) -> None:
    """All ranks stop before the optimizer step, and the error names the sample by its global index; or all skip it."""

    def poison(step: int, role: str, per_sample: Tensor) -> Tensor:
        return per_sample / (torch.arange(4) != 2) if (step, role) == (AT, "fake") else per_sample

    for name in ("stop", "skip"):
        (tmp_path / name).mkdir()
    ended = two(tmp_path / "stop", poison=poison)
    assert codes(ended) == [3, 3]
    assert "step 7, sample(s) [6]: the loss of 1 sample(s) of the fake is not finite" in ended[0].said
    assert "step_000005" in ended[0].said and ended[1].said == ""
    assert steps(tmp_path / "stop") == [5]

    assert codes(two(tmp_path / "skip", poison=poison, on_nonfinite="skip")) == [0, 0]
    row = read_metrics(tmp_path / "skip" / "run")[-1]
    assert (row["skipped/fake"], row["updates/fake"], row["updates/student"]) == (2, 38, 40)


def test_hung_rank_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After loop.rank_timeout the others exit with RANK_LOST, name the rank, and finish the checkpoint in progress."""

    def at(rank: int, step: int) -> None:
        if (rank, step) == (1, 5):
            time.sleep(10)

    commit = checkpoint._commit  # slower than rank 0 waits for rank 1
    monkeypatch.setattr(checkpoint, "_commit", lambda *parts: (time.sleep(4), commit(*parts)))
    monkeypatch.setattr("gdmd.training.distributed.ROLL_CALL_SECONDS", 2)
    ended = two(tmp_path, at, rank_timeout=2, checkpoint_async=True)
    assert codes(ended) == [4, 4]
    assert "rank 0 lost contact" in ended[0].said and "Ranks 1 failed to pass monitoredBarrier" in ended[0].said
    assert "The last good checkpoint is" in ended[0].said and "step_000005" in ended[0].said
    assert steps(tmp_path) == [5]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_killed_ranks_resume_bit_for_bit(tmp_path: Path, sharding: str) -> None:
    """Killed while they write a checkpoint, or just after; with one rank killed the other exits with RANK_LOST."""

    def all_die(rank: int, step: int) -> None:
        if step == AT:
            os.kill(os.getpid(), signal.SIGKILL)

    def one_dies(rank: int, step: int) -> None:
        if (rank, step) == (1, 2 * AT):
            os.kill(os.getpid(), signal.SIGKILL)

    changes = {"sharding": sharding, "checkpoint_async": True}
    (tmp_path / "whole").mkdir()
    assert codes(two(tmp_path / "whole", **changes)) == [0, 0]
    assert codes(two(tmp_path, all_die, **changes)) == [-signal.SIGKILL] * 2
    assert set(steps(tmp_path)) <= {5}
    if sharding == "none":
        ended = two(tmp_path, one_dies, **changes)
        assert codes(ended) == [4, -signal.SIGKILL] and "rank 0 lost contact with another rank" in ended[0].said
        assert "step_000010" in ended[0].said
    assert codes(two(tmp_path, **changes)) == [0, 0]
    whole, other = (checkpoint.load_newest(folder / "run" / "checkpoints") for folder in (tmp_path / "whole", tmp_path))
    assert whole is not None and other is not None and whole.step == other.step == 20 and whole.state == other.state
    for part in ("student", "fake", "ema", "optim_student", "method"):
        assert all(torch.equal(other.part(part)[name], value) for name, value in whole.part(part).items()), part
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_error_on_one_rank_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is printed once: by rank 0 for its full disk, by rank 1 for its reward server."""

    def at(rank: int, step: int) -> None:
        if (rank, step) == (1, AT):
            raise ValueError("the reward server of this machine is gone")

    for name in ("disk", "server"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fsync", full_disk)
        ended = two(tmp_path / "disk")
    assert codes(ended) == [2, 2] and steps(tmp_path / "disk") == []
    assert "step_000005: No space left" in ended[0].said and ended[1].said == ""

    ended = two(tmp_path / "server", at)
    assert codes(ended) == [4, 2]
    assert ended[1].said == "error: the reward server of this machine is gone\n"
