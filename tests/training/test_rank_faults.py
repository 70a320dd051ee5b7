"""Two ranks when things go wrong: a signal to one, a hung one, a killed one, bad numbers in one, a full disk."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ended, run_ranks
from torch import Tensor
from toy_training import Toy, ToyMethod, ToyRoles, ToyStream, toy_config

from gdmd.cli.app import main
from gdmd.runs import checkpoint
from gdmd.runs.run_folder import create, open_run, read_metrics
from gdmd.training.distributed import World
from gdmd.training.loop import train

AT = 6
"""The step at which it happens; checkpoints are made every five."""


@pytest.fixture(scope="module", autouse=True)
def _loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What training imports on first use, before the ranks are forked: in each of them it would take seconds."""
    Toy(tmp_path_factory.mktemp("loaded") / "run", toy_config(1)).train()


def two(
    folder: Path,
    at_step: Callable[[int, int], None] = lambda rank, step: None,
    poison: Callable[[int, str, Tensor], Tensor] | None = None,
    meanwhile: Callable[[Sequence[Any]], None] = lambda processes: None,
    **changes: Any,
) -> list[Ended]:
    """A toy run of 20 steps by two ranks."""
    run = folder / "run"

    def work(world: World) -> int:
        cfg = toy_config(20, **changes)
        world.on_first(lambda: None if run.exists() else create(run, {}).path.name)
        roles = ToyRoles()
        own = poison if world.rank_info.rank == 1 else None
        stream = ToyStream(8, lambda step: at_step(world.rank_info.rank, step))
        return train(ToyMethod(roles, poison=own), roles, stream, cfg, open_run(run), world=world).exit_code

    return run_ranks(work, folder, seconds=120, meanwhile=meanwhile)


def steps(folder: Path) -> list[int]:
    return checkpoint.steps(folder / "run" / "checkpoints")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint_and_its_exit_code(tmp_path: Path, number: int) -> None:
    def at(rank: int, step: int) -> None:
        if (rank, step) == (1, AT):
            for _ in range(2):  # a scheduler and a launcher may both send it
                os.kill(os.getpid(), number)

    ended = two(tmp_path, at)
    assert [end.code for end in ended] == [128 + number] * 2
    assert steps(tmp_path) == [5, AT + 1]
    assert [end.code for end in two(tmp_path)] == [0, 0]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 21))


def test_bad_numbers_in_one_rank_stop_all_before_the_step_and_name_the_sample(tmp_path: Path) -> None:
    def poison(step: int, role: str, per_sample: Tensor) -> Tensor:
        return per_sample / (torch.arange(4) != 2) if (step, role) == (AT, "fake") else per_sample

    ended = two(tmp_path, poison=poison)
    assert [end.code for end in ended] == [3, 3]
    assert "step 6, sample(s) [6]: the loss of 1 sample(s) of the fake is not finite" in ended[0].said
    assert "step_000005" in ended[0].said and ended[1].said == ""
    assert steps(tmp_path) == [5]


def test_bad_numbers_in_one_rank_can_be_skipped_by_all(tmp_path: Path) -> None:
    def poison(step: int, role: str, per_sample: Tensor) -> Tensor:
        return per_sample * torch.inf if (step, role) == (AT, "fake") else per_sample

    assert [end.code for end in two(tmp_path, poison=poison, on_nonfinite="skip")] == [0, 0]
    row = read_metrics(tmp_path / "run")[-1]
    assert (row["skipped/fake"], row["updates/fake"], row["updates/student"]) == (2, 38, 40)


def test_a_rank_that_hangs_is_named_and_ends_the_run(tmp_path: Path) -> None:
    def at(rank: int, step: int) -> None:
        if (rank, step) == (1, AT):
            time.sleep(30)

    began = time.monotonic()
    ended = two(tmp_path, at, rank_timeout=1)
    assert time.monotonic() - began < 20
    assert [end.code for end in ended] == [4, 4]
    assert "rank 1 (on " in ended[0].said and "the others have waited for" in ended[0].said
    assert "step_000005" in ended[0].said
    assert "test_rank_faults.py" in ended[1].said and " in at\n" in ended[1].said  # the place where it hung


def test_a_run_that_ends_itself_finishes_the_checkpoint_that_it_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 hangs at once after a checkpoint, whose writer on rank 0 takes longer than rank 0 waits for rank 1."""
    commit = checkpoint.commit

    def slow(place: checkpoint.Place, *rest: Any) -> Path:
        time.sleep(4)
        return commit(place, *rest)

    def at(rank: int, step: int) -> None:
        if (rank, step) == (1, 5):
            time.sleep(30)

    monkeypatch.setattr(checkpoint, "commit", slow)
    ended = two(tmp_path, at, rank_timeout=1, checkpoint_async=True)
    assert ended[0].code == 4 and "rank 1 (on " in ended[0].said
    assert "The last good checkpoint is" in ended[0].said and "step_000005" in ended[0].said
    assert steps(tmp_path) == [5]


def test_a_killed_rank_ends_the_others_with_a_clear_error(tmp_path: Path) -> None:
    def at(rank: int, step: int) -> None:
        if (rank, step) == (1, AT):
            os.kill(os.getpid(), signal.SIGKILL)

    ended = two(tmp_path, at)
    assert [end.code for end in ended] == [4, -signal.SIGKILL]
    assert "rank 0 lost contact with another rank" in ended[0].said and "step_000005" in ended[0].said
    assert [end.code for end in two(tmp_path)] == [0, 0]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_all_ranks_killed_at_once_go_on_and_end_as_the_undisturbed_run(tmp_path: Path, sharding: str) -> None:
    def at(rank: int, step: int) -> None:
        if step == AT:
            os.kill(os.getpid(), signal.SIGKILL)

    changes = {"sharding": sharding, "checkpoint_async": True}  # killed while they write, or just after
    (tmp_path / "whole").mkdir()
    assert [end.code for end in two(tmp_path / "whole", **changes)] == [0, 0]
    assert [end.code for end in two(tmp_path, at, **changes)] == [-signal.SIGKILL] * 2
    assert set(steps(tmp_path)) <= {5}
    assert [end.code for end in two(tmp_path, **changes)] == [0, 0]
    whole, other = (checkpoint.load_newest(folder / "run" / "checkpoints") for folder in (tmp_path / "whole", tmp_path))
    assert whole is not None and other is not None and whole.step == other.step == 20 and whole.state == other.state
    for part in ("student", "fake", "ema", "optim_student", "method"):
        assert all(torch.equal(other.part(part)[name], value) for name, value in whole.part(part).items()), part
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_full_disk_of_rank_0_ends_all_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_fsync", full)
    ended = two(tmp_path)
    assert [end.code for end in ended] == [2, 2]
    assert "step_000005: No space left" in ended[0].said and ended[1].said == ""
    assert steps(tmp_path) == []


def test_a_rank_that_cannot_write_its_shard_ends_all_in_one_iteration_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: checkpoint.Place, name: str, *rest: Any) -> dict[str, str]:
        with checkpoint._whole_or_absent(place):
            if place.step == 10 and name.startswith("shard-00002"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(place, name, *rest)

    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", full)
    ended = two(tmp_path, sharding="full")
    assert [end.code for end in ended] == [2, 2]
    assert "step_000010: No space left" in ended[1].said
    assert "step_000010" in ended[0].said or ended[0].said == ""  # it may have met the folder already taken away
    assert steps(tmp_path) == [5]
    monkeypatch.undo()
    assert [end.code for end in two(tmp_path, sharding="full")] == [0, 0]
    assert steps(tmp_path) == [15, 20]


def test_an_error_in_one_rank_is_said_by_it_and_ends_the_others(tmp_path: Path) -> None:
    def at(rank: int, step: int) -> None:
        if (rank, step) == (1, AT):
            raise ValueError("the reward server of this machine is gone")

    ended = two(tmp_path, at)
    assert [end.code for end in ended] == [4, 2]
    assert ended[1].said == "error: the reward server of this machine is gone\n"


def test_gpus_that_do_not_divide_the_batch_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "shapes_smoke", "loop.batch_size=3", "--gpus", "2", "--run", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert "loop.batch_size = 3 does not divide among 2 ranks" in capsys.readouterr().err
