"""Several ranks for a test: forked processes (torch is loaded already) connected by gloo."""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp  # once, here: in every rank it would take seconds
import torch.utils.tensorboard  # noqa: F401
from torch import Tensor

from gdmd.cli.app import exit_code, report
from gdmd.training.distributed import DistributedContext, session

BROKEN = 99
"""Exit code of a rank that failed in a way unknown to the program."""


@contextmanager
def linear_steps() -> Iterator[None]:
    """Inside, AdamW has eps 1: a step of about lr x gradient, so that weights differ as little as gradients do.

    With eps 1e-8 a gradient that is only rounding error moves its weight by a fraction of a full step, differently on
    every processor. Checkpoints, optimizer state and clipping are those of AdamW.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1.0))
        yield


@pytest.fixture(scope="module")
def cheap_linear_steps() -> Iterator[None]:
    """``linear_steps`` without fsync, for all ranks of a module's tests."""
    with linear_steps(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None) -> float:
    """|one - other| / |one - start|, all tensors in one vector; start: 0 by default."""
    assert one.keys() == other.keys() and one
    a, b = (torch.cat([named[name].double().flatten() for name in one]) for named in (one, other))
    begin = 0 if start is None else torch.cat([start[name].double().flatten() for name in one])
    return float((a - b).norm() / (a - begin).norm())


@dataclass(frozen=True)
class Ended:
    """How a rank ended; a negative code is a signal."""

    code: int
    said: str


def run_ranks(
    work: Callable[[DistributedContext], int | None],
    folder: Path,
    size: int = 2,
    seconds: float = 300,
    local_size: int | None = None,
) -> list[Ended]:
    """Do ``work`` in ``size`` ranks and collect their stderr."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, logs = multiprocessing.get_context("fork"), [folder / f"rank{rank}.log" for rank in range(size)]
    places = [
        {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % (local_size or size)}
        | {"LOCAL_WORLD_SIZE": local_size or size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(size)
    ]
    processes = [
        context.Process(target=_rank, args=(work, {k: str(v) for k, v in place.items()}, log, seconds))
        for place, log in zip(places, logs, strict=True)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    said = [log.read_text() for log in logs]
    assert not late, f"{len(late)} of {size} ranks did not end in {seconds} s; they said {said}"
    return [Ended(process.exitcode or 0, text) for process, text in zip(processes, said, strict=True)]


def _rank(work: Callable[[DistributedContext], int | None], place: dict[str, str], log: Path, seconds: float) -> None:
    os.environ.update(place)
    sys.stderr = log.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    faulthandler.dump_traceback_later(0.8 * seconds, file=sys.stderr)  # where a late rank hangs
    torch.set_num_threads(1)
    code = BROKEN
    try:
        with session() as context:
            code = work(context) or 0
    except ValueError as error:
        report(error)
        code = exit_code(error)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
